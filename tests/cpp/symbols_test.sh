#!/usr/bin/env bash
# symbols_test.sh NM { --set NAMESPACE OBJECT... }...: what the objects of an instruction set define for the linker must lie in
# the namespace of that set.  Anything else (an inline function of std:: or of src/math that was not inlined) exists once per
# set under one name, the linker keeps any of them, and a machine without AVX-512 may be given that copy.
set -euo pipefail
nm=$1
shift
namespace='' objects=0 bad=0
while (($#)); do
  if [ "$1" = --set ]; then
    namespace=$2
    shift 2
    continue
  fi
  objects=$((objects + 1))
  # Harmless: DW.ref.__gxx_personality_v0, the address of C++'s unwinder routine, which every object that frees memory when an
  # exception passes defines alike; __odr_asan.<mangled name>, which the address sanitizer defines for each global.
  if foreign=$("$nm" --demangle --defined-only --extern-only --format=just-symbols "$1" | grep -v -e "unswag::$namespace::" -e '^DW\.ref\.__gxx_personality_v0$' -e '^__odr_asan\.'); then
    echo "$1 defines outside unswag::$namespace:"
    echo "$foreign"
    bad=1
  fi
  shift
done
[ "$objects" -gt 0 ] || { echo "no objects were given"; bad=1; }
exit $bad
