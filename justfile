# Every command of the project, in one place: `uv run just` lists them.

# List the commands.
default:
    @just --list --unsorted

# Everything but the tests: lock, format, lint, arrows between packages, types.
check: lock format-check lint imports types

# The lock file is up to date.
lock:
    uv lock --check

# Formatting, without changing a file.
format-check:
    ruff format --check .

# Lint.
lint:
    ruff check .

# Arrows between packages: satellites know the core, never each other.
imports:
    lint-imports

# Strict types over every package, and the public API as users type it.
types:
    python scripts/check_types.py

# Format, and mend what the linter can.
fix:
    ruff format .
    ruff check --fix .

# The whole test suite.
test *ARGS:
    pytest {{ARGS}}

# What takes seconds.
quick *ARGS:
    pytest -m "not slow and not packaging and not distributed" {{ARGS}}

# One package's tests, in an environment that has only that package and the core.
isolated PACKAGE:
    uv run --isolated --package {{PACKAGE}} --no-default-groups --group test pytest packages/{{PACKAGE}}

# Ratios against peers, measured side by side.
bench *ARGS:
    python -m benchmarks {{ARGS}}

# The oldest dependencies that the packages promise to work with.
lowest *ARGS:
    uv run --isolated --resolution lowest-direct pytest -m "not slow and not packaging" {{ARGS}}

# Wheels and source distributions of all five packages.
build:
    uv build --all-packages
