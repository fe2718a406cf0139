"""Every labelled result of the book has an executable check; and the coverage test itself is tested."""

import pytest
from nbformat import v4

from dev import equations


def notebook(*cells: str):
    "Cells that begin with 'md:' are prose, the others code."
    made = [v4.new_markdown_cell(c[3:]) if c.startswith("md:") else v4.new_code_cell(c) for c in cells]
    return v4.new_notebook(cells=made)


RESULT = "md:The energy is\n\n$$\nE = m c^2\n$$ (eq-energy)\n"
CHECKED = "# check: eq-energy\nassert 1 + 1 == 2"


def test_the_book():
    book = equations.book()
    print(equations.coverage(book))
    assert not (found := equations.problems(book)), "\n".join(found)


@pytest.mark.parametrize(
    "check",
    [
        CHECKED,
        "#| hide\n\n# check: eq-energy\nassert_close(1, 1)",
        "#check: eq-energy\ntorch.testing.assert_close(1, 1)",
        "# check: eq-energy\nwith pytest.raises(ValueError):\n    float('x')",
        "# check: eq-energy\nfor i in range(3):\n    assert i < 3",
        "# check: eq-energy , eq-energy\nx = 1; assert x",
        "# check: eq-energy\nnp.testing.assert_allclose(1, 1)",
    ],
)
def test_a_checked_result_is_fine(check):
    assert equations.problems({"01": notebook(RESULT, check)}) == []


@pytest.mark.parametrize(
    "book, complaint",
    [
        ({"01": [RESULT]}, "01: result (eq-energy) has no cell that begins '# check: eq-energy'"),
        ({"01": [RESULT, "# check: eq-energy\nprint(2)"]}, "asserts nothing"),
        ({"01": [RESULT, "# check: eq-energy\n# assert 1 == 1"]}, "asserts nothing"),
        ({"01": [RESULT, "# check: eq-energy\n'no assert here'"]}, "asserts nothing"),
        ({"01": [RESULT, "# check: eq-energy\nassertion = 1"]}, "asserts nothing"),
        ({"01": [RESULT, "#| eval: false\n# check: eq-energy\nassert True"]}, "asserts nothing when it runs"),
        ({"01": [RESULT, "x = 1\n# check: eq-energy\nassert x"]}, "has no cell that begins"),
        ({"01": [RESULT, CHECKED, "# check: eq-enregy\nassert 1"]}, "'# check: eq-enregy' names no labelled equation"),
        ({"01": [RESULT, CHECKED, "# check:\nassert 1"]}, "names no equation"),
        ({"01": [RESULT, CHECKED], "02": [RESULT]}, "02: label (eq-energy) is used already in 01"),
        ({"01": [RESULT, CHECKED, RESULT]}, "01: label (eq-energy) is used already in 01"),
        ({"01": ["md:$$ a = b $$ (energy)"]}, "01: label (energy) is neither"),
        ({"01": ["md:$$ a = b $$ (eq-Energy_1)"]}, "neither"),
    ],
)
def test_what_is_refused(book, complaint):
    found = equations.problems({name: notebook(*cells) for name, cells in book.items()})
    assert any(complaint in problem for problem in found), found


def test_several_results_and_several_names():
    prose = (
        "md:$$ a = b $$ (eq-a) and then\n\n$$\nc = d\n$$  (eq-c)\n\nand $$ e $$ without a label, $x$ (eq-not-displayed)"
    )
    nb = notebook(prose, "# check: eq-a, eq-c\nassert True")
    assert equations.labels(nb) == ["eq-a", "eq-c"] and equations.problems({"01": nb}) == []
    assert equations.coverage({"01": nb}) == "2 of 2 labelled results checked, 0 definitions"


def test_definitions_need_no_check_but_may_have_one():
    definition = "md:$$ a := b $$ (def-a)"
    assert equations.problems({"01": notebook(definition)}) == []
    assert equations.problems({"01": notebook(definition, "# check: def-a\nassert 1")}) == []


def test_a_check_may_stand_in_another_notebook():
    assert equations.problems({"01": notebook(RESULT), "solutions/01": notebook(CHECKED)}) == []


def test_labels_in_code_are_not_results():
    shown = "md:Write `$$ a $$ (eq-shown)` or\n\n```\n$$ a $$ (eq-fenced)\n```\n\nthus."
    assert equations.labels(notebook(shown)) == []
