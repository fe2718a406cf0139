"The study of a recipe's luck: its configurations are the bundled model's, shortened, and differ where they should."

import pytest

from stable_diffusion_scratch.recipe import TIMES, check, read_config

study = pytest.importorskip("recipe")  # of bench/, which an installed copy has not


def test_every_configuration_of_the_study_can_be_followed():
    plans = {(seed, times): study.plan(seed, times, 60) for seed in range(2) for times in TIMES}
    for config in plans.values():
        check(config)
    assert read_config()["unet"]["channels"] != [32, 64]  # the recipe itself is left as it was
    one, two = plans[0, "uniform"], plans[0, "stratified"]
    assert one["text_training"] == two["text_training"]  # both ways listen to one encoder
    assert one["unet_training"] | {"times": "stratified"} == two["unet_training"]
    other = plans[1, "uniform"]
    for section in ("text_training", "unet_training"):
        assert one[section] | {"seed": other[section]["seed"]} == other[section]
        assert one[section]["seed"] != other[section]["seed"]
