#!/bin/bash
# Exports a disk in every format and reads each with every independent reader that is installed:
# qemu-img, libvhdi, libvmdk, libqcow (Debian: libvhdi-utils, libvmdk-utils, libqcow-utils), and
# dissect.hypervisor (PyPI). Each must give the bytes of the disk.
#
# usage: scripts/formats-compare.sh [DIR]
#   DIR   a folder in a mounted pool. Without it a pool is made and mounted in a temporary folder,
#         which needs root and /dev/fuse.
# NODUPE=PATH names another build of the program.
set -u
nodupe=${NODUPE:-nodupe}
command -v "$nodupe" >/dev/null || { echo "formats-compare: no $nodupe: build it, or set NODUPE" >&2; exit 2; }
work=$(mktemp -d)
mounted=''
cleanup() {
    [ -z "$mounted" ] || "$nodupe" umount "$mounted" >/dev/null 2>&1
    rm -rf "$work"
}
trap cleanup EXIT
dir=${1:-}
if [ -z "$dir" ]; then
    mkdir "$work/mnt"
    "$nodupe" -q mount --create --size 4G "$work/pool" "$work/mnt" || exit 2
    mounted=$work/mnt
    dir=$work/mnt
fi
raw=$dir/formats-compare.raw
python3 - "$raw" <<'PY' || exit 2
import os, random, sys
r = random.Random(5)
with open(sys.argv[1], "wb") as f:
    f.truncate(40 << 20)
    for at, n in ((0, 4096), (1 << 20, 300 << 10), (7 << 20, 5 << 20), ((40 << 20) - 4096, 4096)):
        f.seek(at)
        f.write(r.randbytes(n))
PY
bad=0 done=0 absent=''
result() {              # name of the check, exit code
    if [ "$2" = 0 ]; then done=$((done + 1)); else echo "DIFFERENT: $1"; bad=$((bad + 1)); fi
}
dissected() {           # format, image: the bytes by dissect.hypervisor
    python3 - "$1" "$2" "$raw" <<'PY'
import sys
kind, path, raw = sys.argv[1:]
from dissect.hypervisor.disk import qcow2, vdi, vhd, vhdx, vmdk
if kind == "vhdx":
    stream = vhdx.VHDX(open(path, "rb"))
elif kind == "vhd":
    stream = vhd.VHD(open(path, "rb"))
elif kind == "vdi":
    stream = vdi.VDI(open(path, "rb"))
elif kind == "vmdk":
    stream = vmdk.VMDK(open(path, "rb"))
else:
    stream = qcow2.QCow2(open(path, "rb"))
if hasattr(stream, "open"):
    stream = stream.open()
stream.seek(0)
sys.exit(stream.read(40 << 20) != open(raw, "rb").read())
PY
}
for pair in qemu-img=qemu-utils vhdiinfo=libvhdi-utils vmdkinfo=libvmdk-utils qcowinfo=libqcow-utils; do
    command -v "${pair%%=*}" >/dev/null || absent="$absent ${pair#*=}"
done
python3 -c 'import dissect.hypervisor' 2>/dev/null || absent="$absent dissect.hypervisor"
[ -z "$absent" ] || echo "formats-compare: not installed, left out:$absent"
while read -r name options; do
    image=$work/$name
    # The options are words.
    # shellcheck disable=SC2086
    "$nodupe" -q export "$raw" "$image" $options || { bad=$((bad + 1)); continue; }
    kind=${name##*.}
    if command -v qemu-img >/dev/null; then
        [ "$kind" = vhd ] && format=vpc || format=$kind
        qemu-img compare -q -f "$format" -F raw "$image" "$raw"
        result "qemu-img $name" $?
    fi
    case $kind in vhd | vhdx) info=vhdiinfo ;; vmdk) info=vmdkinfo ;; qcow2) info=qcowinfo ;; *) info='' ;; esac
    if [ -n "$info" ] && command -v "$info" >/dev/null; then
        "$info" "$image" >"$work/info" 2>&1 && grep -q 41943040 "$work/info"
        result "$info $name" $?
    fi
    if python3 -c 'import dissect.hypervisor' 2>/dev/null; then
        dissected "$kind" "$image" 2>"$work/error"
        code=$?
        [ $code = 0 ] || tail -1 "$work/error"
        result "dissect.hypervisor $name" $code
    fi
done <<'LIST'
a.vhd
b.vhd --subformat dynamic
a.vhdx
b.vhdx --subformat fixed
a.vmdk
c.vmdk --subformat streamOptimized
a.vdi
b.vdi --subformat fixed
a.qcow2
b.qcow2 --compress
LIST
rm -f "$raw"
echo "formats-compare: $done comparisons equal, $bad different"
[ "$bad" = 0 ]
