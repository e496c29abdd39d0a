#!/usr/bin/env bash
# tools/packages.sh PACKAGE...: installs these Debian packages if we are root, else says that they are needed and fails.
set -euo pipefail
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q </dev/null
  apt-get install -qy --no-install-recommends "$@" </dev/null
else
  echo "UnSwag needs these packages first: apt-get install $*" >&2
  exit 1
fi
