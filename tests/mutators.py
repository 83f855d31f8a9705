"""Small changes of Python source that some test should notice: found in the syntax tree, made in the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_ARITHMETIC = {ast.Add: "+-", ast.Sub: "-+", ast.Mult: "*/", ast.Div: "/*"}
_OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    **{kind: (old, new) for kind, (old, new) in _ARITHMETIC.items()},
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
_SWAPPED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "round": "int"}
_TEXTS = {"warn", "print", "info", "debug", "warning"}  # calls that only tell somebody something
_MERE_POSITIONS = {"isinstance", "getattr", "hasattr", "zip"}  # whose swapped arguments no test need notice, or all do
_MERE_KEYWORDS = {"stacklevel", "indent"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of one file.

    Attributes:
        path: of the file, as given.
        function: the line that the innermost function's code begins with, decorators included; 0 for the module.
        operator: what kind of change it is.
        start, end: the bytes that are replaced.
        replacement: what takes their place.
    """

    path: str
    function: int
    operator: str
    start: int
    end: int
    replacement: str

    def apply(self, source: str) -> str:
        """The mutated source."""
        data = source.encode()
        return (data[: self.start] + self.replacement.encode() + data[self.end :]).decode()

    def lines(self, source: str) -> tuple[int, str, str]:
        """Where it is, counted from 1, and the lines before and after, joined if they are several."""
        data, mutated = source.encode(), self.apply(source).encode()
        first = data.rfind(b"\n", 0, self.start) + 1
        tail = len(data) - (data + b"\n").index(b"\n", self.end)
        texts = (" ".join(text[first : len(text) - tail].decode().split()) for text in (data, mutated))
        original, changed = texts
        return data.count(b"\n", 0, self.start) + 1, original, changed


def find_mutants(path: str, source: str, functions_only: bool = False) -> list[Mutant]:
    """Every mutant of a file, in the order of their places; a few may turn out invalid, see ``is_change``.

    Docstrings, annotations, decorators, f-strings, what is raised or warned of, ``__all__``, blocks for type checkers
    and functions compiled by a ``jit`` are left alone.
    """
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    mutants = dict[tuple[int, int, str], Mutant]()
    for mutant in finder.found:
        if mutant.function or not functions_only:
            mutants.setdefault((mutant.start, mutant.end, mutant.replacement), mutant)
    return [mutants[key] for key in sorted(mutants)]


def is_change(mutant: Mutant, source: str) -> bool:
    """Whether a mutant is valid Python and differs from its source."""
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


class _Finder(ast.NodeVisitor):
    """Walks a tree and notes what could be otherwise."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.data = path, source.encode()
        self.line_starts = [0, *(match.end() for match in re.finditer(rb"\n", self.data))]
        self.functions, self.found = [0], list[Mutant]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any(re.search(r"\bjit\b", decorator) for decorator in decorators):
            return
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.functions.append(min(part.lineno for part in (node, *node.decorator_list)))
        self._visit_all(node.body)
        self.functions.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all(node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Their places are not to be trusted before Python 3.12."""

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self._visit_all(node.orelse)
            return
        if isinstance(node.body[-1], ast.Raise) and not node.orelse:
            self._replace(node.test, "False", "guard")
            self.visit(node.test)
        else:
            self._negate(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(isinstance(part, ast.JoinedStr) or _is_text(part) for part in (node.left, node.right)):
            self._between(node.left, node.right, node.op, "arithmetic")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._between(node.target, node.value, node.op, "arithmetic")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for (left, right), op in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
            self._between(left, right, op, "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if len(node.values) == 2:
            self._between(*node.values, node.op, "logic")
        else:  # one operator among several would need parentheses
            for i in range(len(node.values)):
                kept = [ast.unparse(value) for at, value in enumerate(node.values) if at != i]
                word = _OPERATORS[type(node.op)][0]
                self._replace(node, "(" + f" {word} ".join(f"({text})" for text in kept) + ")", "logic")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            start = self._span(node)[0]
            self._add(start, start + len("not "), "", "not")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value), "flag")
        elif isinstance(node.value, int):
            self._replace(node, str(node.value + 1), "constant")
        elif isinstance(node.value, float):
            self._replace(node, repr(node.value * 2 if node.value else 1.0), "constant")

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in _MERE_KEYWORDS:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _TEXTS:
            return
        if name in _SWAPPED and (name != "round" or isinstance(node.func, ast.Name)):
            end = self._span(node.func)[1]
            self._add(end - len(name), end, _SWAPPED[name], name)
        if name in ("sqrt", "round") and isinstance(node.func, ast.Attribute):
            kept = node.args[0] if node.args else node.func.value
            self._replace(node, f"({self._text(kept)})", name)
        if name not in _MERE_POSITIONS and not (node.args and _is_text(node.args[0])):
            for left, right in pairwise(node.args):
                self._swap(left, right)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            bounds = (part.lower, part.upper) if isinstance(part, ast.Slice) else (part,)
            for bound in bounds:
                is_index = isinstance(bound, ast.Name) and (isinstance(part, ast.Slice) or len(bound.id) <= 2)
                if is_index or isinstance(bound, ast.BinOp):
                    self._replace(bound, f"({self._text(bound)}) + 1", "index")
        self.generic_visit(node)

    def _visit_all(self, nodes: Sequence[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self.line_starts[node.lineno - 1] + node.col_offset
        return start, self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.data[start:end].decode()

    def _add(self, start: int, end: int, replacement: str, operator: str) -> None:
        self.found.append(Mutant(self.path, self.functions[-1], operator, start, end, replacement))

    def _replace(self, node: ast.AST, replacement: str, operator: str) -> None:
        self._add(*self._span(node), replacement, operator)

    def _negate(self, test: ast.expr) -> None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return  # what ``visit_UnaryOp`` does to it
        self._replace(test, f"not ({self._text(test)})", "condition")

    def _between(self, left: ast.expr, right: ast.expr, op: ast.AST, operator: str) -> None:
        """Another operator in the gap between two operands, in which there may be brackets too."""
        if type(op) in _OPERATORS:
            old, new = _OPERATORS[type(op)]
            at = self.data.index(old.encode(), self._span(left)[1], self._span(right)[0])
            self._add(at, at + len(old), new, operator)

    def _swap(self, left: ast.expr, right: ast.expr) -> None:
        if isinstance(left, ast.Starred) or isinstance(right, ast.Starred):
            return
        (start, gap_start), (gap_end, end) = self._span(left), self._span(right)
        gap = self.data[gap_start:gap_end].decode()
        if not {"(", ")"} & set(gap):
            self._add(start, end, self._text(right) + gap + self._text(left), "arguments")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
