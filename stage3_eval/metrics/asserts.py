"""A test of a program, taken apart so that the program never meets what is expected of it. Called by `programs`.

`assert f([1, 2]) == [2, 1]` becomes the expression `f([1, 2])`, which is evaluated where the program is, and the test
`_0_0 == [2, 1]`, which is evaluated elsewhere with the value as plain data. Whatever the program does to its process,
it can only answer with a value, and it passes where that value is right.
"""

import ast
import builtins
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

# What can be read of a value that arrives as plain data.
_PLAIN = (str, bytes, int, float, complex, list, tuple, frozenset, dict, Fraction, Decimal)
_OF_PLAIN_DATA = frozenset(name for kind in _PLAIN for name in dir(kind))


@dataclass(frozen=True)
class Assertion:
    """expressions: what the program evaluates, by the names that its values have in `test`, which must be true."""

    expressions: Mapping[str, str]
    test: str


def parse(code: str) -> ast.Module:
    """`ast.parse`, silent about odd escapes and comparisons. Raises SyntaxError, and whatever else that raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def split(line: str, names: Iterable[str], number: int = 0) -> Assertion:
    """Take one `assert` apart. names: those that the program defines. number: of the test; its values are `_<number>_0`
    and so on.

    Raises ValueError with the reason where it cannot be: it is no single assert, calls nothing of the program, calls it
    within a comprehension, whose variables exist only there, or asks what only an object of its own could answer.
    """
    try:
        body = parse(line.strip()).body
    except SyntaxError as error:
        raise ValueError(f"it is no Python: {error.msg}") from None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError("it is not one assert")
    taker = _Taker(frozenset(names), f"_{number}_")
    test = ast.unparse(taker.visit(body[0].test))
    if not taker.taken:
        raise ValueError("it uses nothing that the reference solution defines")
    return Assertion(taker.taken, test)


def defined_names(code: str) -> set[str]:
    """The functions, classes and variables that a program defines at its top level. Raises SyntaxError."""
    return {name for statement in parse(code).body for name in _bound(statement)}


def imports_of(code: str) -> str:
    """The imports at a program's top level. Raises SyntaxError."""
    found = (node for node in parse(code).body if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(ast.unparse(node) for node in found)


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif not isinstance(statement, ast.Import | ast.ImportFrom):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


class _Taker(ast.NodeTransformer):
    """Replaces what the program must evaluate by a name, and keeps it under that name."""

    def __init__(self, names: frozenset[str], prefix: str) -> None:
        self.names, self.prefix = names, prefix
        self.taken: dict[str, str] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        """The node, or the name that stands for it where the program must evaluate it."""
        if isinstance(node, ast.expr) and self._of_program(node):
            name = f"{self.prefix}{len(self.taken)}"
            self.taken[name] = ast.unparse(node)
            return ast.Name(name, ast.Load())
        before = len(self.taken)
        visited: ast.AST = self.generic_visit(node)
        if isinstance(node, ast.Attribute) and len(self.taken) > before and node.attr not in _OF_PLAIN_DATA:
            raise ValueError(f"it reads .{node.attr} of what the program returns, which plain data has not")
        local = isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda)
        if local and len(self.taken) > before:
            raise ValueError("it calls the program within a comprehension or a lambda")
        return visited

    def _of_program(self, node: ast.expr) -> bool:
        """A name of the program with what is read, indexed or called on it; a built-in function on that alone.

        What is read or indexed on the *result* of a call is not: `f(2).startswith("xy")` would hand the expected value
        to an object of the program's own, and believe its verdict. It is asked of the value as plain data.
        """
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Attribute | ast.Subscript):
            return self._of_program(node.value) and not any(isinstance(n, ast.Call) for n in ast.walk(node.value))
        if not isinstance(node, ast.Call):
            return False
        alone = len(node.args) == 1 and not node.keywords and isinstance(node.func, ast.Name)
        if alone and isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id):
            return self._of_program(node.func) or self._of_program(node.args[0])
        return self._of_program(node.func)
