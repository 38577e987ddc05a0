# What the set-up's scripts share. Each of them takes `--check`: install nothing, name what is missing, fail if anything is.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:/usr/local/go/bin"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${ADIT_CACHE:-$HOME/.cache/adit}
check=; [ "${1-}" = --check ] && { check=1; shift; }
say() { printf 'setup: %s\n' "$*"; }

# Ends here if the list of what is missing is empty, or if it was only to be shown.
missing() {
  [ $# -gt 0 ] || exit 0
  [ -z "$check" ] || { say "missing: $*"; exit 1; }
}
