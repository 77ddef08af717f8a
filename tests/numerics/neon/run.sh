#!/bin/sh
# Builds the kernels for aarch64, runs them under qemu-user, and compares every instruction set with this machine's
# scalar build by the hashes that driver.cpp prints. Installs nothing.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
build=$root/build/neon

missing=
command -v g++ >/dev/null || missing="$missing g++"
command -v aarch64-linux-gnu-g++ >/dev/null || missing="$missing g++-aarch64-linux-gnu"
command -v qemu-aarch64 >/dev/null || missing="$missing qemu-user"
if [ -n "$missing" ]; then
  echo "make neon: not found:$missing. On Debian or Ubuntu: apt install$missing" >&2
  exit 1
fi
if [ "$(uname -m)" != x86_64 ]; then
  echo "make neon: compares aarch64 with x86-64, so it must run on x86-64; this machine is $(uname -m)." >&2
  exit 1
fi

# The flags of the real build: its options for every file, and those of one instruction set.
lists=$root/CMakeLists.txt
common="-std=c++$(sed -n 's/^set(CMAKE_CXX_STANDARD \([0-9]*\))$/\1/p' "$lists") -Wall -Wextra -Werror \
$(sed -n 's/^target_compile_options(_C PRIVATE \(-O.*\))$/\1/p' "$lists")"
per_isa="$(sed -n '/^set(decoders/,/)$/p' "$lists" | tr -d '()' | sed 's/^setdecoders//') csrc/xxh3.cpp"
isa_flags() { sed -n "s/^ *add_isa($1 *\(.*\))\$/\1/p" "$lists"; }
case $common in *-ffp-contract=off*) ;; *)
  echo "make neon: found no -ffp-contract=off in $lists; this script looks for target_compile_options(_C PRIVATE -O...)." >&2
  exit 1 ;;
esac

# compile COMPILER ISA...: the driver with these instruction sets, statically linked. Flags are split on purpose.
compile() {
  compiler=$1 objects=
  shift
  mkdir -p "$build/$compiler"
  for isa in "$@"; do
    $compiler $common $(isa_flags "$isa") -c "$root/csrc/cpu/$isa.cpp" -o "$build/$compiler/$isa.o"
    objects="$objects $build/$compiler/$isa.o"
    for source in $per_isa; do
      object=$build/$compiler/$isa-$(basename "$source" .cpp).o
      $compiler $common $(isa_flags "$isa") -DFI_ISA="$isa" -c "$root/$source" -o "$object"
      objects="$objects $object"
    done
  done
  $compiler $common -static -o "$build/$compiler/driver" "$here/driver.cpp" "$root/csrc/cpu/backend.cpp" $objects
}

compile g++ scalar avx2 avx512 &
native=$!
compile aarch64-linux-gnu-g++ scalar neon
wait "$native"

"$build/g++/driver" >"$build/x86-64.txt" &
native=$!
qemu-aarch64 "$build/aarch64-linux-gnu-g++/driver" >"$build/aarch64.txt"
wait "$native"

{ sed 's/^/x86-64 /' "$build/x86-64.txt"; sed 's/^/aarch64 /' "$build/aarch64.txt"; } | awk '
  $1 == "x86-64" && $2 == "scalar" { expected[$3] = $4; group[++groups] = $3 }
  { column = $1 "/" $2; hash[column, $3] = $4; if (!(column in seen)) { seen[column] = 1; name[++columns] = column } }
  END {
    printf "%-22s %-16s", "group", "hash"
    for (c = 1; c <= columns; ++c) printf "  %s", name[c]
    print ""
    for (g = 1; g <= groups; ++g) {
      printf "%-22s %s", group[g], expected[group[g]]
      for (c = 1; c <= columns; ++c) {
        same = hash[name[c], group[g]] == expected[group[g]]
        same ? ++passed : ++failed
        printf "  %-" length(name[c]) "s", same ? "same" : "DIFFERS"
      }
      print ""
    }
    # At least scalar twice and neon; an empty table is not a pass.
    if (columns < 3 || groups == 0) { print "make neon: a driver printed nothing"; ++failed }
    printf "%d passed, %d failed\n", passed, failed
    exit failed > 0
  }'
