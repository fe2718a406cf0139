"""Mutants of a piece of source: one small change each, of the kinds that slip into formulas.

+ for -, * for /, a dropped sign, a square or a square root dropped, a number doubled, an index or an offset moved by
one, a comparison turned round, min for max. Annotations, docstrings and what is raised are left alone, and in a
check also its tolerances.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
OPERATORS = {**BINARY, **COMPARED, **{b: a for a, b in COMPARED.items()}, ast.And: ast.Or, ast.Or: ast.And}
PAIRS = {"min": "max", "minimum": "maximum", "amin": "amax", "argmin": "argmax", "floor": "ceil"}
OPPOSITE = {**PAIRS, **{b: a for a, b in PAIRS.items()}}
MODULES = {"math", "torch", "np"}
TOLERANCES = {"rtol", "atol", "abs", "rel", "delta", "msg"}
LEFT_ALONE = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutant:
    "A source with one change, and the change by a name that other changes of the source do not alter."

    key: str  # function: expression -> expression
    source: str


def _replacements(node: ast.AST, place: str) -> Iterator[str]:
    "What could stand in place of `node`; `place` is 'index', 'whole' (an offset, an argument) or ''."
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        sides = [getattr(node, "left", None), getattr(node, "right", None)]
        if not any(isinstance(s, ast.Tuple | ast.List | ast.JoinedStr) or _is(s, str) for s in sides):
            yield _with(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _is(node.right, int | float):
        yield ast.unparse(node.left)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield _with(node, ops=[OPERATORS[type(node.ops[0])]()])
    elif isinstance(node, ast.keyword) and node.arg in OPPOSITE:
        yield _with(node, arg=OPPOSITE[node.arg])
    elif isinstance(node, ast.Attribute) and node.attr in OPPOSITE:
        yield _with(node, attr=OPPOSITE[node.attr])
    elif isinstance(node, ast.Name) and (node.id in OPPOSITE or place == "index"):
        yield OPPOSITE.get(node.id) or f"{node.id} + 1"
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "sqrt":
        of = node.func.value
        yield ast.unparse(node.args[0] if isinstance(of, ast.Name) and of.id in MODULES else of)
    elif _is(node, int | float):
        yield repr(node.value + 1 if not node.value or (place and isinstance(node.value, int)) else 2 * node.value)


def _is(node, kind) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, kind) and not isinstance(node.value, bool)


def _with(node: ast.AST, **fields) -> str:
    return ast.unparse(type(node)(**{**dict(ast.iter_fields(node)), **fields}))


def _children(node: ast.AST, place: str, of_check: bool) -> Iterator[tuple[ast.AST, str]]:
    "The nodes below that may change, each with its place."
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or name in ("annotation", "returns", "ctx"):
                continue
            if of_check and isinstance(node, ast.Compare) and isinstance(child, ast.Constant):
                continue  # asserted to be less than this
            if isinstance(node, ast.Subscript) and name == "slice":
                yield child, "index"
            elif isinstance(node, ast.Slice | ast.Tuple | ast.UnaryOp):
                yield child, place
            elif isinstance(node, ast.Call) and name == "args":
                yield child, "index" if getattr(node.func, "id", "") == "range" else "whole"
            elif isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub):
                yield child, "whole"
            else:
                yield child, ""


def _walk(node: ast.AST, where: tuple, above: tuple, place: str, of_check: bool) -> Iterator[tuple]:
    "(where, node, the nodes above it, replacement) for every change."
    if isinstance(node, LEFT_ALONE) or (of_check and isinstance(node, ast.keyword) and node.arg in TOLERANCES):
        return
    if not (of_check and isinstance(node, ast.Compare)):
        for text in _replacements(node, place):
            yield ".".join(where), node, above, text
    inner = (*where, node.name) if isinstance(node, ast.FunctionDef | ast.ClassDef) else where
    for child, its_place in _children(node, place, of_check):
        yield from _walk(child, inner, (node, *above), its_place, of_check)


def _named(statement: ast.stmt) -> tuple:
    "A definition names its parts itself; a constant's are named after it."
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return (targets[0].id,) if isinstance(targets[0], ast.Name) else ()


def mutants_of(source: str, of_check: bool = False) -> list[Mutant]:
    "The mutants of an exported cell's definitions and constants; `of_check`: of all lines of a check."
    tree, text = ast.parse(source), source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    found, seen = [], Counter()
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and not of_check:
            continue
        for where, node, above, new in _walk(statement, _named(statement), (), "", of_check):
            first, last = span(node)
            bare = isinstance(node, ast.stmt | ast.keyword | ast.Constant | ast.Name | ast.Attribute)
            new = new if bare else f"({new})"
            shown = next((a for a in above if isinstance(a, ast.expr | ast.keyword | ast.stmt)), node)
            begin, end = span(shown)
            if hasattr(shown, "body") and isinstance(shown, ast.stmt) or end - begin > 120:
                begin, end = first, last
            old = " ".join(text[begin:end].decode().split())
            became = " ".join((text[begin:first] + new.encode() + text[last:end]).decode().split())
            key = f"{where}: {old} -> {became}"
            seen[key] += 1
            key += f" ({seen[key]})" if seen[key] > 1 else ""
            found.append(Mutant(key, (text[:first] + new.encode() + text[last:]).decode()))
    return found
