"Pictures from outside: parity with Hugging Face's own reading of the same folder, properties, faults."

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stable_diffusion_scratch.data import Row, dataset_rows, folder_rows, gather, square


def picture(k: int, size=(12, 9), mode: str = "RGB") -> Image.Image:
    "A picture of random pixels."
    g = torch.Generator().manual_seed(k)
    channels = len(mode)
    return Image.frombytes(mode, size, bytes(torch.randint(256, (size[0] * size[1] * channels,), generator=g).tolist()))


@pytest.fixture
def folder(tmp_path):
    "Three pictures in the form of an image folder."
    for k in range(3):
        picture(k).save(tmp_path / f"{k}.png")
    lines = [json.dumps({"file_name": f"{k}.png", "text": f"number {k}"}) for k in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.sampled_from(["RGB", "RGBA", "L", "P", "LA", "1"])
)
def test_any_picture_becomes_a_square_of_bytes(width, height, size, mode):
    out = square(Image.new(mode, (width, height)), size)
    assert out.shape == (3, size, size) and out.dtype == torch.uint8


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 30))
def test_the_middle_is_kept_pixel_for_pixel_where_nothing_is_resized(width, height):
    side = min(width, height)
    out = square(picture(0, (width, height)), side)
    whole = torch.tensor(list(picture(0, (width, height)).tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    top, left = (height - side) // 2, (width - side) // 2
    assert torch.equal(out, whole[top : top + side, left : left + side].permute(2, 0, 1))


@pytest.mark.daily
def test_a_folder_reads_as_datasets_reads_it(folder):
    datasets = pytest.importorskip("datasets")
    images = [Image.open(folder / f"{k}.png") for k in range(3)]
    theirs = datasets.Dataset.from_dict(
        {"image": images, "text": [f"number {k}" for k in range(3)]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    ours, same = gather(folder_rows(folder), 8), gather(dataset_rows(theirs), 8)
    assert torch.equal(ours.pictures, same.pictures) and ours.captions == same.captions
    assert ours.captions == ["number 0", "number 1", "number 2"] and not ours.skipped


def test_what_is_broken_is_named_skipped_and_counted(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 pictures: 1\.png \("):
        found = gather(folder_rows(folder), 8)
    assert found.captions == ["number 0", "number 2"] and [name for name, _ in found.skipped] == ["1.png"]
    assert torch.equal(found.pictures[1], square(picture(2), 8))


def test_a_long_list_of_broken_pictures_is_cut(tmp_path):
    rows = [Row(f"{k}.png", tmp_path / f"{k}.png", "x") for k in range(9)] + [Row("good", picture(0), "x")]
    with pytest.warns(UserWarning, match=r"skipped 9 of 10 .*and 4 more"):
        assert len(gather(rows, 4).pictures) == 1


@pytest.mark.parametrize("text", [None, "", "  ", 3])
def test_no_caption_is_no_empty_caption(text):
    with pytest.warns(UserWarning, match="no caption"), pytest.raises(ValueError, match="no picture could be read"):
        gather([Row("a", picture(0), text)], 4)


def test_nothing_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"metadata\.jsonl is missing: write a line"):
        list(folder_rows(tmp_path))
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="there are no pictures"):
        gather(folder_rows(tmp_path), 4)
    with pytest.raises(ValueError, match="size = 0"):
        gather([], 0)


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"text": "no name"}', '"a.png"'])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(ValueError, match="line 2: need an object with file_name and text"):
        list(folder_rows(tmp_path))


def test_a_missing_column_is_named_with_those_that_are_there():
    rows = [{"picture": picture(0), "caption": "a"}]
    with pytest.raises(ValueError, match="no column 'image'; its columns: picture, caption"):
        list(dataset_rows(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gather(dataset_rows(rows, "picture", "caption"), 4).captions == ["a"]
