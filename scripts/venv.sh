# Sourced by scripts/demo, scripts/test and .ci/run; needs bash, Python >= 3.11 and the network's package index.
#
#   find_python          sets `python` to a Python that can make a virtual environment; where there is none, returns 1 and sets
#                        `python_fault` to a line that says what is missing, `python_packages` to the packages that bring it.
#   ensure_venv EXTRAS   makes $root/.venv from constraints.txt where it is missing or outdated, with the extras named
#                        (`demo` or `demo,dev`). Exits with one line that says what is missing where it cannot.
#
# The environment is made anew when constraints.txt changed, the tree was moved or an installation was interrupted; it is
# brought up to date in place when only the project's own description changed or an extra is to be added. Its stamp is
# written last, so an environment without one is never taken for whole.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
command_name=${0##*/}

# What surrounds us must not choose the modules that run, nor where pip installs them.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER=0

say() { printf '%s: %s\n' "$command_name" "$*" >&2; }

fail() {
  say "$*"
  exit 1
}

# Prints, for a working Python: its version, whether it is new enough and has ensurepip, the executable itself (never the
# one of a virtual environment, which may be the very one that is about to be replaced).
readonly PYTHON_PROBE='
import sys
verdict = "ok"
if sys.version_info < (3, 11):
    verdict = "old"
else:
    try:
        import ensurepip, venv
    except ImportError:
        verdict = "bare"
executable = getattr(sys, "_base_executable", None) or sys.executable
sys.stdout.write("%d.%d %s %s\n" % (sys.version_info[0], sys.version_info[1], verdict, executable))
'

find_python() {
  local candidate version verdict executable candidates=(python3.13 python3.12 python3.11 python3 python)
  local as_root="" old="" bare=""
  python="" python_fault="" python_packages=""
  if (( EUID != 0 )); then as_root="sudo "; fi
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    read -r version verdict executable < <("$candidate" -c "$PYTHON_PROBE" 2>/dev/null) || continue
    case $verdict in
      ok)
        python=$executable python_version=$version
        return 0
        ;;
      bare) bare=${bare:-$version} ;;
      old) old=${old:-$version} ;;
    esac
  done
  if [[ -n ${PYTHON:-} && -n $old ]]; then
    python_fault="PYTHON=$PYTHON is Python $old, 3.11 or newer is needed; run: PYTHON=python3.11 scripts/$command_name"
  elif [[ -n ${PYTHON:-} && -z $bare ]]; then
    python_fault="PYTHON=$PYTHON is no Python that runs; name one of 3.11 or newer, or run: unset PYTHON"
  elif [[ -n $bare ]]; then
    python_packages="python$bare-venv"
    python_fault="Python $bare lacks the modules venv and ensurepip; run: ${as_root}apt-get install $python_packages"
  elif [[ -n $old ]]; then
    python_packages="python3.11 python3.11-venv"
    python_fault="only Python $old is here, 3.11 or newer is needed; run: ${as_root}apt-get install $python_packages"
  else
    python_packages="python3 python3-venv"
    python_fault="no Python is here, 3.11 or newer is needed; run: ${as_root}apt-get install $python_packages"
  fi
  return 1
}

# The first two lines of a stamp: what the environment as a whole, and what the project's installation in it, was made from.
venv_base() { printf 'base %s\n' "$( (printf '%s\n' "$root" && cat "$root/constraints.txt") | sha256sum | cut -c 1-64)"; }
venv_project() { printf 'project %s\n' "$(cat "$root/pyproject.toml" "$root/kvstore/__init__.py" | sha256sum | cut -c 1-64)"; }

# venv_has base|project|extras [EXTRAS]: whether the environment that is there serves, up to that point.
venv_has() {
  local base project extras version wanted
  [[ -f $venv/kvstored-stamp ]] || return 1
  { read -r base && read -r project && read -r extras && read -r version; } < "$venv/kvstored-stamp" || return 1
  [[ $base == "$(venv_base)" ]] || return 1
  # The system's Python may have been replaced under the environment.
  [[ $("$venv/bin/python" -I -c 'import sys; print("python %d.%d" % sys.version_info[:2])' 2>/dev/null) == "$version" ]] || return 1
  if [[ -n ${PYTHON:-} ]]; then
    wanted=$("$PYTHON" -c 'import sys; print("python %d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    [[ $wanted == "$version" ]] || return 1
  fi
  if [[ $1 == base ]]; then return 0; fi
  [[ $project == "$(venv_project)" ]] || return 1
  if [[ $1 == project ]]; then return 0; fi
  [[ ",${extras#extras }," == *",$2,"* ]]
}

pip_install() { pip_run --constraint constraints.txt "$@"; }

pip_run() {
  (
    cd -- "$root"
    exec "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "$@"
  ) 2> "$venv/pip.log" || explain_pip_failure
}

# The oldest numba that is supported (engines pin it), beside the newest one in the environment: a folder for PYTHONPATH.
oldest_numba=0.65.0
oldest_llvmlite=0.47.0
ensure_oldest_numba() {
  oldest_numba_path=$venv/numba-$oldest_numba
  if [[ ! -f $oldest_numba_path/complete ]]; then
    rm -rf -- "$oldest_numba_path"
    pip_run --no-deps --target "$oldest_numba_path" "numba==$oldest_numba" "llvmlite==$oldest_llvmlite"
    : > "$oldest_numba_path/complete"
  fi
}

explain_pip_failure() {
  local log=$venv/pip.log last
  last=$(grep -E '^ *(ERROR|error): ' "$log" | tail -n 1) || true
  if grep -qE 'No space left on device' "$log"; then
    fail "no space left on the disk for .venv; free some gigabytes (PyTorch needs them), then run this again"
  elif grep -qE 'name resolution|Name or service not known|NewConnectionError|Network is unreachable|Connection refused|[Tt]imed out|ProxyError|SSLError|CERTIFICATE_VERIFY_FAILED|Max retries exceeded|Connection broken' "$log"; then
    fail "the package index cannot be reached; connect to the network, or name a reachable index: PIP_INDEX_URL=https://... scripts/$command_name (details: $log)"
  fi
  fail "pip could not install what .venv needs: ${last:-it gave no reason} (details: $log)"
}

make_venv() {
  local extras=$1 base project version requirement requirements=()
  base=$(venv_base) project=$(venv_project)
  if venv_has base; then
    say "bringing .venv up to date ..."
    if venv_has project; then
      # Only an extra is missing. The project itself stays untouched, somebody may be running it.
      while IFS= read -r requirement; do requirements+=("$requirement"); done < <(
        cd -- "$root" && "$venv/bin/python" -I -c '
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(requirement for extra in sys.argv[1].split(",") for requirement in extras[extra]), sep="\n")
' "$extras"
      )
      extras=demo,dev
    else
      if grep -q '^extras demo,dev$' "$venv/kvstored-stamp"; then extras=demo,dev; fi
    fi
    version=$(tail -n 1 "$venv/kvstored-stamp")
    rm -f -- "$venv/kvstored-stamp"
  else
    find_python || fail "$python_fault"
    if [[ -e $venv && ! -f $venv/kvstored-owner && -n $(ls -A -- "$venv") ]]; then
      fail ".venv exists and is not of this script's making; run: mv $(printf '%q %q' "$venv" "$venv.old")"
    fi
    say "making .venv with Python $python_version (a minute with a fast network; PyTorch is most of it) ..."
    { rm -rf -- "$venv" && mkdir -- "$venv" && : > "$venv/kvstored-owner"; } || fail "$root cannot be written to"
    "$python" -m venv "$venv" > "$venv/pip.log" 2>&1 || fail "$python could not make a virtual environment (details: $venv/pip.log)"
    version="python $python_version"
    pip_install --retries 2 pip
    pip_install hatchling editables
  fi
  if (( ${#requirements[@]} )); then
    pip_install "${requirements[@]}"
  else
    pip_install --no-build-isolation --editable ".[$extras]"
  fi
  printf '%s\n' "$base" "$project" "extras $extras" "$version" > "$venv/kvstored-stamp.new"
  mv -- "$venv/kvstored-stamp.new" "$venv/kvstored-stamp"
}

ensure_venv() {
  local extras=$1 last=${1##*,}
  if venv_has extras "$last"; then return 0; fi
  command -v flock > /dev/null || fail "the command flock is missing; run: apt-get install util-linux"
  # pip keeps its downloads under the home directory: without one that can be written to, it keeps none.
  if [[ -z ${PIP_CACHE_DIR:-} && -z ${XDG_CACHE_HOME:-} ]] && [[ -z ${HOME:-} || ! -w ${HOME:-} ]]; then
    export PIP_NO_CACHE_DIR=1
  fi
  # One run makes the environment, others wait and then find it made. The lock is the tree's own directory.
  (
    flock --nonblock 9 || { say "waiting for another run that makes .venv ..." && flock 9; }
    if ! venv_has extras "$last"; then make_venv "$extras"; fi
  ) 9< "$root"
}
