# shellcheck shell=bash
# Sourced by scripts/demo, scripts/test and .ci/run: makes the environment they run in, once.
#
#   .venv         exactly the versions of requirements.lock (the default)
#   .venv-newest  the newest released versions, on the newest Python here that they support;
#                 made when CURVATURE_ENVIRONMENT=newest
#
# Sets root (this checkout) and venv (the environment's folder). Needs Python 3.11 or later; uses uv
# where it is on PATH, because it is faster, and otherwise venv and pip.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# find_python NAME...: print the first Python that can hold the environment. For every name, all
# programs so called on PATH and then pyenv's versions, because a pyenv shim may exist and yet fail.
find_python() {
  local name candidate versions="" modules="sys, sysconfig"
  command -v uv >/dev/null || modules="$modules, ensurepip, venv" # split off by some distributions
  command -v pyenv >/dev/null && versions="$(pyenv root)/versions"
  for name in "$@"; do
    while IFS= read -r candidate; do
      # 3.14 is the last version that the locked wheels are built for; free-threaded builds need
      # wheels of their own.
      if [ -x "$candidate" ] && "$candidate" -c "import $modules
sys.exit(not ((3, 11) <= sys.version_info < (3, 15)
              and sys.implementation.name == 'cpython'
              and not sysconfig.get_config_var('Py_GIL_DISABLED')))" 2>/dev/null; then
        echo "$candidate"
        return
      fi
    done < <(type -aP "$name"; printf '%s\n' "$versions/${name#python}."*/bin/python)
  done
  return 1
}

find_any_python() { find_python python3 python3.11 python3.12 python3.13 python3.14; }
find_new_python() { find_python python3.14 python3.13 python3.12; }

# The stamp of a recipe file is its own text and the checkout's place (an environment does not
# survive being moved): no hash to compute, and comparing takes a few milliseconds.
stamp_text() { echo "$root" && cat "$root/$1"; }
stamp() { stamp_text "$1" >"$venv/$1.stamp"; }
is_installed() {
  [ -x "$venv/bin/python" ] && stamp_text "$1" | cmp -s - "$venv/$1.stamp"
}

# Two first runs at once would write over one another; the second one waits.
lock() {
  if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9
  fi
}

say() { echo "${venv##*/}: $*" >&2; }

# create FINDER: an empty environment.
create() {
  local python
  if ! python="$("$1")"; then
    say "needs Python 3.11 to 3.14 (CPython, with its venv module), and none was found among" \
      "python3, python3.11 ... python3.14 on PATH and pyenv's versions. Please install one."
    return 1
  fi
  say "installing with $("$python" -V); this takes a minute or two, once"
  rm -rf "${venv:?}" # what an older or interrupted run left is not worth repairing
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$python" "$venv" # with pip, for runs without uv
  else
    "$python" -m venv "$venv"
  fi
}

install() { # install ARGUMENTS-OF-PIP-INSTALL...
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" # only errors
  fi
}

# Every stamp is written after what it stands for, so an interrupted run counts as not installed.
# The body is a subshell: its settings, its folder and its lock end with it.
make_locked() (
  set -euo pipefail
  cd "$root"
  lock
  if ! is_installed requirements.lock; then
    create find_any_python
    install --requirement requirements.lock
    stamp requirements.lock
  elif ! is_installed pyproject.toml; then
    say "pyproject.toml has changed; installing the project again"
  fi
  if ! is_installed pyproject.toml; then
    install --no-deps --no-build-isolation --editable .
    stamp pyproject.toml
  fi
)

make_newest() (
  set -euo pipefail
  cd "$root"
  lock
  if ! is_installed pyproject.toml; then
    create find_new_python
    install --editable '.[test]'
    stamp pyproject.toml
  fi
)

if [ "${CURVATURE_ENVIRONMENT:-locked}" = newest ]; then
  venv="$root/.venv-newest"
  make_newest
else
  venv="$root/.venv"
  make_locked
fi
