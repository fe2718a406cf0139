"""What captions written by a machine are worth: the same small diffusion model learns the same pictures three times.

    .venv/bin/python bench/recaption.py             three captions x three seeds; writes bench/results/recaption.json
    .venv/bin/python bench/recaption.py --only true --seeds 1 --steps 100 --json FILE

3,000 pictures of 16 x 16 pixels show one object each, in the middle and turned at random. Their captions are *true*
(all four attributes), *terse* (the shape, and each other attribute with one chance in ten, as people label what they
upload), or written by a *machine*: a small network that has learned to caption from the 100 pictures that have a true
caption, and captions all the others (Betker 2023 does this at scale). Everything else is equal: pictures, noise,
timesteps, first weights. The model is as small as the question allows: fully connected layers on 64 principal
components of the pictures, conditioned on the sum of the caption's words. Judged is whether what it paints for a full
prompt shows it, by a second network, trained on truth, whose own error on unseen renders is stated. A few minutes of
one core.
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _study import study_parser
from torch import Tensor, nn

from stable_diffusion_scratch.captions import VOCABULARY, Description, caption, describe
from stable_diffusion_scratch.denoisers import VDenoiser, simple_loss
from stable_diffusion_scratch.evaluation import compare, tabulate
from stable_diffusion_scratch.forward import DiscreteVP, cosine_betas
from stable_diffusion_scratch.guidance import bind, cfg
from stable_diffusion_scratch.layers import timestep_embedding
from stable_diffusion_scratch.pipeline import SAMPLERS, noise_levels
from stable_diffusion_scratch.samplers import last
from stable_diffusion_scratch.scenes import ATTRIBUTES, HELD_OUT, Camera, Scenes, render, sample_attributes
from stable_diffusion_scratch.training import Run, train, warmup_cosine

SIZE, PICTURES, CAPTIONED, SAID = 16, 3000, 100, 0.1
STEPS, BATCH, SEEDS, GUIDANCE, REPEATS = 2000, 64, 3, 2.0, 5
KINDS = ("true", "terse", "machine")
COMPONENTS, WIDTH, BLOCKS = 64, 128, 3
PROCESS = DiscreteVP(cosine_betas(1000))
CAMERA = Camera(width=2.0)  # near enough for the object to fill the picture


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(n: int, seed: int, split: str) -> tuple[Tensor, Scenes]:
    "n pictures [n 3 16 16] of one object each, with 3 x 3 rays a pixel, and what they show."
    generator = seeded(seed)
    attributes, relation = sample_attributes(n, generator, split, objects=1)
    turn = torch.rand(n, 2, generator=generator) * torch.pi / 2
    scenes = Scenes(attributes, relation, torch.zeros(n, 2, 2), turn)
    return render(scenes, SIZE, CAMERA, samples=3, chunk=64), scenes


# --- the reader: one small network, trained twice --------------------------------------------------------------------


def reader(seed: int) -> nn.Sequential:
    "Pictures [b 3 16 16] -> logits [b 15] for size, color, material and shape side by side."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kinds = sum(map(len, ATTRIBUTES.values()))
        layer = lambda a, b: (nn.Linear(a, b), nn.SiLU())  # noqa: E731
        return nn.Sequential(nn.Flatten(), *layer(3 * SIZE**2, 192), *layer(192, 128), nn.Linear(128, kinds))


def answers(logits: Tensor) -> tuple[Tensor, ...]:
    "The logits of each attribute."
    return logits.split([len(v) for v in ATTRIBUTES.values()], -1)


def read(net: nn.Module, pictures: Tensor) -> list[Description]:
    "The likeliest description of each picture."
    with torch.no_grad():
        best = torch.stack([part.argmax(-1) for part in answers(net(pictures))], -1)  # [b 4]
    rows = torch.stack([best, torch.full_like(best, -1)], 1)
    n = len(pictures)
    return describe(Scenes(rows, torch.full((n,), -1), torch.zeros(n, 2, 2), torch.zeros(n, 2)))


def learn_to_read(pictures: Tensor, scenes: Scenes, steps: int, seed: int) -> nn.Module:
    "A reader of these pictures, seen a little brighter or darker, and noisy."
    net = reader(seed)

    def loss(net: nn.Module, g: torch.Generator) -> Tensor:
        pick = torch.randint(len(pictures), (64,), generator=g)
        x = pictures[pick] + 0.1 * (torch.rand(64, 1, 1, 1, generator=g) - 0.5)
        x = x + 0.1 * torch.rand(64, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        parts, truth = answers(net(x)), scenes.attributes[pick, 0]
        return sum(F.cross_entropy(part, truth[:, k]) for k, part in enumerate(parts))

    run = Run(net, loss, warmup_cosine(2e-3, steps, warmup=20), seed, decay=0.99, weight_decay=0.05)
    for _ in train(run, steps):
        pass
    net.load_state_dict(run.average)
    return net.eval()


def right(net: nn.Module, pictures: Tensor, said: Sequence[Description]) -> dict:
    "Shares of pictures that show what is said, with intervals, as the reader sees them."
    return tabulate([compare(a, b) for a, b in zip(said, read(net, pictures), strict=True)])


# --- captions --------------------------------------------------------------------------------------------------------


def terse(description: Description, generator: torch.Generator) -> Description:
    "The shape, and each other attribute with chance SAID."
    (thing,) = description.things
    keep = (torch.rand(3, generator=generator) < SAID).tolist()
    return Description(((*(v if k else None for v, k in zip(thing, keep, strict=False)), thing[3]),))


def written(kind: str, pictures: Tensor, scenes: Scenes, writer: nn.Module) -> list[Description]:
    "What the captions of this kind say."
    truth, generator = describe(scenes), seeded(5)
    if kind == "true":
        return truth
    if kind == "terse":
        return [terse(d, generator) for d in truth]
    return truth[:CAPTIONED] + read(writer, pictures[CAPTIONED:])


def counts(texts: Sequence[str]) -> Tensor:
    "How often each text has each word of the vocabulary [b words]."
    table = torch.zeros(len(texts), len(VOCABULARY))
    for row, text in zip(table, texts, strict=True):
        for word in re.findall("[a-z]+", text):
            row[VOCABULARY.index(word)] += 1
    return table


# --- the model -------------------------------------------------------------------------------------------------------


class Codes:
    "Pictures as their first principal components, scaled to a mean square of one, and back: a linear autoencoder."

    def __init__(self, pictures: Tensor):
        flat = pictures.flatten(1)
        self.mean = flat.mean(0)
        self.basis = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:COMPONENTS]  # [k d]
        self.scale = 1.0
        self.scale = self.encode(pictures).square().mean().sqrt().item()

    def encode(self, pictures: Tensor) -> Tensor:
        return (pictures.flatten(1) - self.mean) @ self.basis.T / self.scale

    def decode(self, codes: Tensor) -> Tensor:
        return (self.scale * codes @ self.basis + self.mean).unflatten(1, (3, SIZE, SIZE)).clamp(-1, 1)


class Painter(nn.Module):
    "Noisy codes [b k], times [b] and counted words [b words] -> v [b k]: residual blocks, scaled and shifted."

    def __init__(self):
        super().__init__()
        self.words = nn.Linear(len(VOCABULARY), WIDTH, bias=False)
        self.time = nn.Linear(32, WIDTH)
        self.enter, self.leave = nn.Linear(COMPONENTS, WIDTH), nn.Linear(WIDTH, COMPONENTS)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(BLOCKS))
        self.tell = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(BLOCKS))
        self.work = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        told = F.silu(self.time(timestep_embedding(t.expand(len(x)), 32)) + self.words(words))
        h = self.enter(x)
        for norm, tell, work in zip(self.norms, self.tell, self.work, strict=True):
            scale, shift = tell(told).chunk(2, -1)
            h = h + work((1 + scale) * norm(h) + shift)
        return self.leave(h)


def learn_to_paint(codes: Tensor, words: Tensor, steps: int, seed: int) -> tuple[Painter, list[float]]:
    "The painter with averaged weights, and the loss of every step; a tenth of the captions are hidden."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Painter()

    def loss(net: nn.Module, g: torch.Generator) -> Tensor:
        pick = torch.randint(len(codes), (BATCH,), generator=g)
        hidden = torch.rand(BATCH, 1, generator=g) < 0.1
        return simple_loss(net, PROCESS, codes[pick], words[pick] * ~hidden, "v", generator=g).mean()

    run = Run(net, loss, warmup_cosine(2e-3, steps, warmup=50), seed, decay=0.995)
    for _ in train(run, steps):
        pass
    net.load_state_dict(run.average)
    return net.eval(), run.losses


@torch.no_grad()
def paint(net: Painter, words: Tensor, seed: int, guidance: float = GUIDANCE, steps: int = 20) -> Tensor:
    "Codes of pictures for these captions, by DDIM."
    denoise = VDenoiser(net, PROCESS)
    guided = cfg(bind(denoise, words), bind(denoise, torch.zeros_like(words)), guidance)
    sigmas = noise_levels(PROCESS, steps, "trailing")
    x = torch.randn(len(words), COMPONENTS, generator=seeded(seed)) * (1 + sigmas[0].item() ** 2) ** 0.5
    return last(SAMPLERS["ddim"](guided, x, sigmas)).x


def everything() -> tuple[list[Description], list[bool]]:
    "All 96 things that a prompt can ask for, and whether training held the combination out."
    things = list(itertools.product(*ATTRIBUTES.values()))
    return [Description((t,)) for t in things], [(t[1], t[3]) in HELD_OUT for t in things]


def study(kinds: Sequence[str], seeds: range, steps: int, file: Path) -> None:
    "Accuracy of every kind and seed; the file is written after each."
    start = time.process_time()
    pictures, scenes = single(PICTURES, 1, "train")
    unseen, shown = single(1000, 2, "all")
    codes = Codes(pictures)
    seen_as = codes.decode(codes.encode(unseen))  # what a painter of codes could paint at best
    judge = learn_to_read(*single(PICTURES, 3, "all"), steps=2000, seed=0)
    writer = learn_to_read(pictures[:CAPTIONED], scenes[:CAPTIONED], steps=200, seed=1)
    of_writer = right(writer, pictures[CAPTIONED:], describe(scenes[CAPTIONED:]))
    found = {
        "settings": {
            "size": SIZE, "pictures": PICTURES, "captioned": CAPTIONED, "said": SAID, "steps": steps, "batch": BATCH,
            "guidance": GUIDANCE, "prompts": 96 * REPEATS, "torch": torch.__version__,
        },
        "judge": right(judge, unseen, describe(shown)),
        "judge, through the codes": right(judge, seen_as, describe(shown)),
        "writer": of_writer, "kinds": {},
    }  # fmt: skip
    through = found["judge, through the codes"]["all"]["share"]
    print(
        f"judge right on {found['judge']['all']['share']:.1%} of unseen renders, {through:.1%} through the codes;",
        end=" ",
    )
    print(f"writer on {of_writer['all']['share']:.1%}; {time.process_time() - start:.0f} s", flush=True)
    said, unseen_kind = everything()
    prompts = counts([caption(d) for d in said]).repeat(REPEATS, 1)
    latents = codes.encode(pictures)
    for seed in seeds:
        for kind in kinds:
            start = time.process_time()
            texts = [caption(d) for d in written(kind, pictures, scenes, writer)]
            net, losses = learn_to_paint(latents, counts(texts), steps, seed)
            painted = codes.decode(paint(net, prompts, 1000 + seed))
            answers = [compare(a, b) for a, b in zip(said * REPEATS, read(judge, painted), strict=True)]
            parts = {"seen": [], "held out": []}
            for answer, new in zip(answers, unseen_kind * REPEATS, strict=True):
                parts["held out" if new else "seen"].append(answer)
            entry = found["kinds"].setdefault(kind, {"example": texts[CAPTIONED : CAPTIONED + 5], "runs": []})
            scores = {"seed": seed, "loss": sum(losses[-200:]) / 200, "all": tabulate(answers)}
            entry["runs"].append(scores | {part: tabulate(rows) for part, rows in parts.items()})
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            shares = {q: f"{row['share']:.1%}" for q, row in scores["all"].items()}
            print(f"seed {seed} {kind:8} {shares} {time.process_time() - start:.0f} s of one core", flush=True)


def main() -> int:
    parser = study_parser(__doc__, KINDS, "kind", SEEDS, STEPS, "recaption.json")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    study(given.only or KINDS, range(given.first, given.first + given.seeds), given.steps, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
