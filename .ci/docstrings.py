"""Check the public docstrings of fastattn: `make lint-built`.

`[tool.numpydoc_validation]` of pyproject.toml names the checks.  numpydoc's own command looks at
files, and so at internal functions alike, which need no sections; here it is given the objects that
a user sees: what `fastattn.__all__` lists, and the public methods of its classes.  fastattn.torch
and fastattn.keras are left out, because their libraries need not be installed.
"""

import inspect
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

from numpydoc.docscrape import get_doc_object
from numpydoc.validate import validate

import fastattn


def public_objects() -> Iterator[tuple[str, object]]:
    for name in fastattn.__all__:
        value = getattr(fastattn, name)
        if inspect.ismodule(value):
            continue
        yield f"fastattn.{name}", value
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"fastattn.{name}.{method}", function


def main() -> int:
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["numpydoc_validation"]
    checked = 0
    findings = []
    for name, value in public_objects():
        checked += 1
        fields = inspect.isclass(value) and (issubclass(value, tuple) or is_dataclass(value))
        for code, text in validate(get_doc_object(value))["errors"]:
            # What a named tuple or a dataclass holds is told by its text or beside each field.
            if code in settings["checks"] and not (fields and code == "PR01"):
                findings.append(f"{name}: {code} {text}")
    print(*findings, f"{checked} public docstrings, {len(findings)} findings", sep="\n")
    return int(findings != [])


if __name__ == "__main__":
    sys.exit(main())
