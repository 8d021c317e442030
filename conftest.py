"""What of the package and its pages pytest may import, where a library is not installed."""

from importlib.util import find_spec

# The doors to other libraries: their modules cannot be imported without, nor their pages run.
DOORS = {"torch": ["fastattn/torch.py", "fastattn/_torch_*.py", "docs/torch.md"]}

MISSING = [library for library in DOORS if find_spec(library) is None]

collect_ignore_glob = [path for library in MISSING for path in DOORS[library]]


def pytest_report_header() -> list[str]:
    return [f"{name} is not installed: no examples of {', '.join(DOORS[name])}" for name in MISSING]
