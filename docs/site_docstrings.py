"""What the site's reference needs of griffe, which reads the sources without importing them."""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import griffe

DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """Every run of lines from a prompt to an empty line as a block of code.

    Markdown would make quotations of them.
    """
    return DOCTEST.sub(lambda run: f"{run[1]}```pycon\n{run[0]}\n{run[1]}```", text)


def tree(module: griffe.Module) -> Iterator[griffe.Module]:
    """A module and all below it."""
    yield module
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from tree(member)


@functools.cache
def constants(path: pathlib.Path) -> dict[str, str]:
    """The private constants of a file, as they are written: `_FISHER` is `Fisher()`."""
    found: dict[str, str] = {}
    for line in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign):
            target, value = line.targets[0], line.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=True) if several else [(target, value)]
            found |= {x.id: ast.unparse(y) for x, y in pairs if isinstance(x, ast.Name)}
    return {name: value for name, value in found.items() if name.startswith("_")}


class Sources(griffe.Extension):
    """Doctests in fences, defaults as values, and functions that have the name of their file."""

    def on_function(self, *, func: griffe.Function, **kwargs: object) -> None:
        """Shows the value of a default, where its name is private."""
        for parameter in func.parameters:
            name = str(parameter.default)
            if name.startswith("_") and isinstance(func.filepath, pathlib.Path):
                parameter.default = constants(func.filepath).get(name, parameter.default)

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Fences the doctests of an object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """`optimizer.kfac` is the function of `optimizer/kfac.py`, as it is for Python.

        Griffe sees the file, which hides what is imported from it under its own name.
        """
        functions = {
            file.path: f"{file.path}.{file.name}"
            for module in tree(pkg)
            for file in module.members.values()
            if isinstance(file, griffe.Module)
            and file.name in map(str, module.exports or ())
            and file.name in file.members
        }
        for module in tree(pkg):
            for name, member in list(module.members.items()):
                if isinstance(member, griffe.Alias) and member.target_path in functions:
                    target = functions[member.target_path]
                    module.set_member(name, griffe.Alias(name, target, parent=module))
