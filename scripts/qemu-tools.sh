#!/bin/bash
# QEMU's own tools on two folders: the same commands must do the same in both.
#
# usage: qemu-tools.sh DIR REFERENCE_DIR
#   DIR            a folder in the mounted datastore
#   REFERENCE_DIR  a folder on an ordinary file system, such as ext4
#   QEMU_TOOLS_QUICK=1  fewer combinations of cache mode, asynchronous I/O and format
#   QEMU_TOOLS_KEEP=1   keeps both transcripts and images
#
# Each command runs in DIR and in REFERENCE_DIR; its exit code and its output are written to a
# transcript, and so are checksums of what the images hold. Left out is only what must differ:
# times, speeds, random ids, and the space that a file takes (a datastore may store less).
# The two transcripts must be equal. Covered: qcow2, VHD (vpc), VHDX, VMDK and raw with their
# subformats and preallocation; create, info, check, map, convert (also -C and -W), compare,
# resize, snapshot, backing files with rebase and commit, dd, bench, bitmap, amend; and qemu-io
# in every cache mode with every kind of asynchronous I/O, discards and zero writes included.
# Exit codes: 0 equal, 1 different, 2 usage or a missing program.
set -u
export LC_ALL=C TZ=UTC

[ -d "${1:-}" ] && [ -d "${2:-}" ] || { sed -n '4,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for program in qemu-img qemu-io sha256sum; do
    command -v "$program" >/dev/null || { echo "qemu-tools: $program is missing: run scripts/setup" >&2; exit 2; }
done
quick=${QEMU_TOOLS_QUICK:+yes}
here=$(cd "$1" && pwd)/qemu-tools.$$
reference=$(cd "$2" && pwd)/qemu-tools.$$
scratch=$(mktemp -d)
trap '[ -n "${QEMU_TOOLS_KEEP:-}" ] || rm -rf "$here" "$reference" "$scratch"' EXIT
mkdir "$here" "$reference" || exit 2

# Removes what differs between two runs in one folder as well.
normalise() {
    sed -E -e "s#$PWD#DIR#g" \
        -e '/(ops;|bytes\/sec| KiB\/sec| MiB\/sec|Run completed in)/d' \
        -e '/[Dd]isk size|"actual-size"/d' \
        -e 's/("?cid"?: )[0-9a-f]+/\1CID/; s/(parent[ -]cid"?: )[0-9a-f]+/\1CID/' \
        -e 's/"date-(n?sec)": [0-9]+/"date-\1": N/; s/"vm-clock-(n?sec)": [0-9]+/"vm-clock-\1": N/' \
        -e 's/[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}/TIME/'
}

t() {                   # t COMMAND...: runs it, writes down what it did
    local out status
    out=$(timeout 120 "$@" 2>&1 </dev/null)
    status=$?
    printf '$ %s\n' "$*"
    [ -z "$out" ] || printf '%s\n' "$out" | normalise
    printf '= %s\n' "$status"
}

content() {             # content FORMAT FILE: checksum of what a guest would read
    local raw=content.$RANDOM
    printf '# content of %s: ' "$2"
    if qemu-img convert -f "$1" -O raw "$2" "$raw" 2>content.err; then
        sha256sum <"$raw"
    else
        normalise <content.err
    fi
    rm -f "$raw" content.err
}

mapped() {              # mapped KIND FILE: extents as the format sees them
    local format=${1%% *}
    # Where a format leaves the answer to the file below, as raw does, holes are the file
    # system's business; that extents cover the disk, and that no data hides in an extent called
    # zero, is not.
    case $1 in
    raw* | *fixed* | *Flat* | *preallocation*) ;;
    *) t qemu-img map -f "$format" --output=json "$2"; return ;;
    esac
    qemu-img convert -f "$format" -O raw "$2" map.raw
    qemu-img map -f "$format" --output=json "$2" | python3 -c '
import json, sys
end = 0
with open("map.raw", "rb") as image:
    for extent in json.load(sys.stdin):
        assert extent["start"] == end, f"gap at {end}"
        end += extent["length"]
        image.seek(extent["start"])
        if extent["zero"] and image.read(extent["length"]).strip(b"\0"):
            print("data in an extent called zero at", extent["start"])
print("# map of", sys.argv[1], "covers", end)' "$2"
    rm -f map.raw
}

# ---- images of every kind ------------------------------------------------------------------

kinds=(
    "qcow2" "qcow2 -o preallocation=metadata" "qcow2 -o preallocation=falloc"
    "qcow2 -o preallocation=full" "qcow2 -o cluster_size=4k,lazy_refcounts=on"
    "qcow2 -o extended_l2=on" "qcow2 -o compat=0.10"
    "vpc" "vpc -o subformat=fixed" "vpc -o force_size=on"
    "vhdx" "vhdx -o subformat=fixed" "vhdx -o block_size=1M,log_size=2M"
    "vmdk" "vmdk -o subformat=monolithicFlat" "vmdk -o subformat=twoGbMaxExtentSparse"
    "vmdk -o subformat=twoGbMaxExtentFlat" "vmdk -o subformat=streamOptimized"
    "raw" "raw -o preallocation=falloc" "raw -o preallocation=full"
)

writes=(
    -c "write -P 0x11 0 256k" -c "write -P 0x22 1000k 20k" -c "write -P 0x33 5000k 512"
    -c "write -P 0x44 7654321 12345" -c "write -z 64k 64k" -c "write -z -u 1M 1M"
    -c "writev -P 0x55 12M 4k 8k 16k" -c "aio_write -P 0x66 20M 1M" -c "aio_flush"
    -c "discard 128k 64k" -c "discard 20M 512k" -c "flush" -c "write -f -P 0x77 30M 64k"
)
reads=(
    -c "read -P 0x11 0 64k" -c "read -P 0 64k 64k" -c "read -P 0x22 1000k 20k"
    -c "read -P 0x33 5000k 512" -c "read -P 0x44 7654321 12345" -c "read -P 0x55 12M 28k"
    -c "read -P 0x66 21495808 512k" -c "read -P 0x77 30M 64k" -c "read -P 0 33M 1M"
    -c "readv -P 0x55 12M 4k 24k" -c "aio_read -P 0x77 30M 64k" -c "aio_flush" -c "map" -c "length"
)

images() {
    local kind format name number=0
    for kind in "${kinds[@]}"; do
        format=${kind%% *} number=$((number + 1))
        name=image$number.$format
        # shellcheck disable=SC2086  # the kind is a format and its options
        t qemu-img create -f $kind "$name" 40M
        t qemu-img info -f "$format" "$name"
        t qemu-io -f "$format" -d unmap "${writes[@]}" "$name"
        t qemu-io -r -f "$format" "${reads[@]/#map/length}" "$name"
        t qemu-img check -f "$format" "$name"
        t qemu-img info --output=json "$name"
        mapped "$kind" "$name"
        content "$format" "$name"
        t qemu-io -f "$format" -c "truncate 50M" -c length "$name"
        t qemu-img resize -f "$format" "$name" 60M
        t qemu-img resize -f "$format" --shrink "$name" 38M
        content "$format" "$name"
        rm -f "$name" "${name%.*}"-*
    done
}

# ---- caches and asynchronous I/O -----------------------------------------------------------

caches() {
    local format cache aio name
    for format in qcow2 vpc vhdx vmdk raw; do
        for cache in none writeback writethrough directsync unsafe; do
            for aio in threads native io_uring; do
                case $quick$cache.$aio in
                yeswrite*.io_uring | yeswritethrough.* | yesdirectsync.[ni]* | yesunsafe.* | write*.native | unsafe.native) continue ;;
                esac
                name=cache.$format
                t qemu-img create -q -f $format "$name" 40M
                t qemu-io -f $format -t $cache -i $aio -d unmap "${writes[@]}" "$name"
                t qemu-io -r -f $format -t $cache -i $aio "${reads[@]/#map/length}" "$name"
                t qemu-img check -q -f $format -T $cache "$name"
                content $format "$name"
                rm -f "$name"
            done
        done
    done
    # Deep queues of many small requests, in order and out of it.
    t qemu-img create -q -f qcow2 bench.qcow2 40M
    t qemu-img create -q -f raw bench.raw 40M
    for cache in none writeback; do
        for aio in threads native io_uring; do
            [ "$cache $aio" != "writeback native" ] || continue
            t qemu-img bench -f qcow2 -w --pattern 0xa5 -c 2000 -d 32 -s 4k -S 20480 -t $cache -i $aio bench.qcow2
            t qemu-img bench -f raw -w --pattern 0x5a -c 2000 -d 32 -s 8k -S 12288 --flush-interval 100 -t $cache -i $aio bench.raw
            t qemu-img bench -f raw -c 2000 -d 32 -s 64k -t $cache -i $aio bench.raw
        done
    done
    t qemu-img check bench.qcow2
    content qcow2 bench.qcow2
    content raw bench.raw
    rm -f bench.*
}

# ---- converting ----------------------------------------------------------------------------

convert() {
    local from to cache
    t qemu-img create -q -f raw source.raw 40M
    t qemu-io -f raw "${writes[@]}" source.raw
    for from in qcow2 vpc vhdx vmdk raw; do
        t qemu-img convert -f raw -O $from source.raw "from.$from"
        for to in qcow2 vpc vhdx vmdk raw; do
            case $quick$from.$to in yesraw.* | yes*.raw | yesqcow2.vhdx) ;; yes*) continue ;; esac
            t qemu-img convert -f $from -O $to "from.$from" "to.$to"
            t qemu-img compare -f $from -F $to "from.$from" "to.$to"
            t qemu-img check -q -f $to "to.$to"
            content $to "to.$to"
            rm -f "to.$to"
        done
    done
    for cache in none writeback directsync; do
        t qemu-img convert -t $cache -T $cache -O qcow2 source.raw to.qcow2
        t qemu-img compare source.raw to.qcow2
        t qemu-img convert -W -m 16 -t $cache -T $cache -O raw to.qcow2 to.raw
        t qemu-img compare source.raw to.raw
        t cmp source.raw to.raw
    done
    t qemu-img convert -c -O qcow2 source.raw compressed.qcow2
    t qemu-img check compressed.qcow2
    t qemu-img compare source.raw compressed.qcow2
    t qemu-img convert -C -O raw source.raw offload.raw
    t cmp source.raw offload.raw
    t qemu-img convert -n -O raw from.vhdx offload.raw
    t qemu-img convert -S 0 -O raw source.raw full.raw
    t cmp source.raw full.raw
    t qemu-img dd if=source.raw of=dd.raw bs=64k count=100 skip=3
    t sha256sum dd.raw
    t qemu-img dd -O vhdx if=source.raw of=dd.vhdx bs=1M
    t qemu-img compare source.raw dd.vhdx
    t qemu-io -f raw -c "write -P 9 5M 4k" full.raw
    t qemu-img compare source.raw full.raw
    t qemu-img compare -s source.raw from.qcow2
    rm -f source.raw from.* to.* compressed.* offload.* full.* dd.*
}

# ---- chains, snapshots, and what qcow2 alone can do ----------------------------------------

chains() {
    local cache
    t qemu-img create -q -f qcow2 base.qcow2 64M
    t qemu-io -c "write -P 1 0 8M" -c "write -P 2 40M 64k" base.qcow2
    t qemu-img create -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2
    t qemu-io -c "write -P 3 1M 1M" middle.qcow2
    t qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2
    t qemu-io -c "write -P 4 1500k 3M" -c "write -z 40M 4k" -c "read -P 1 0 1M" -c "read -P 3 1M 476k" top.qcow2
    t qemu-img info --backing-chain --output=json top.qcow2
    t qemu-img map top.qcow2
    content qcow2 top.qcow2
    t cp base.qcow2 other.qcow2
    t qemu-img rebase -b other.qcow2 -F qcow2 top.qcow2
    content qcow2 top.qcow2
    t qemu-img rebase -u -b base.qcow2 -F qcow2 top.qcow2
    t qemu-img commit top.qcow2
    t qemu-img check base.qcow2
    content qcow2 base.qcow2
    t qemu-img rebase -b '' middle.qcow2
    t qemu-img info middle.qcow2
    content qcow2 middle.qcow2
    for format in vpc vmdk; do
        t qemu-img create -q -f $format -b base.$format -F $format child.$format 32M
        t qemu-img create -q -f $format base.$format 32M
        t qemu-img create -q -f $format -b base.$format -F $format child.$format
        t qemu-io -f $format -c "write -P 7 3M 1M" child.$format
        content $format child.$format
    done
    t qemu-img snapshot -c one base.qcow2
    t qemu-io -c "write -P 8 0 20M" -c "discard 40M 4M" base.qcow2
    t qemu-img snapshot -c two base.qcow2
    t qemu-img snapshot -l base.qcow2
    t qemu-img convert -l one -O raw base.qcow2 one.raw
    t sha256sum one.raw
    t qemu-img snapshot -a one base.qcow2
    content qcow2 base.qcow2
    t qemu-img snapshot -d two base.qcow2
    t qemu-img check base.qcow2
    t qemu-img bitmap --add --enable base.qcow2 dirty
    t qemu-io -c "write -P 5 2M 64k" base.qcow2
    t qemu-img info --output=json base.qcow2
    t qemu-img amend -o lazy_refcounts=on,compat=1.1 base.qcow2
    t qemu-img check -r all base.qcow2
    for cache in none writeback; do
        t qemu-img convert -t $cache -o data_file=ext.data,data_file_raw=on -O qcow2 base.qcow2 ext.qcow2
        t qemu-img compare base.qcow2 ext.qcow2
        t sha256sum ext.data
    done
    rm -f base.* middle.* top.* other.* child.* one.* ext.*
}

# ---- what must be refused, and locks --------------------------------------------------------

refusals() {
    local holder
    t qemu-img info missing.qcow2
    t qemu-img create -f qcow2 no/such/folder.qcow2 1M
    t qemu-img create -f raw huge.raw 9E
    printf 'QFI\373 and then nothing of use' >broken.qcow2
    t qemu-img check broken.qcow2
    t qemu-img create -q -f qcow2 locked.qcow2 16M
    # A writer holds the image; a second one must be told so.
    mkfifo hold
    qemu-io -f qcow2 locked.qcow2 <hold >/dev/null 2>&1 &
    holder=$!
    exec 9>hold
    for _ in $(seq 100); do
        grep -qs "qemu-io" "/proc/$holder/comm" && [ -n "$(find /proc/$holder/fd -lname "$PWD/locked.qcow2" 2>/dev/null)" ] && break
        sleep 0.05
    done
    sleep 0.2
    t qemu-io -f qcow2 -c "write 0 64k" locked.qcow2
    t qemu-img info locked.qcow2
    t qemu-img info -U locked.qcow2
    exec 9>&-
    wait "$holder"
    t qemu-io -f qcow2 -c "write 0 64k" locked.qcow2
    t chmod 444 locked.qcow2
    t qemu-io -r -f qcow2 -c "read -P 0xcd 0 64k" locked.qcow2
    rm -f huge.raw broken.qcow2 locked.qcow2 hold
}

everything() { images; caches; convert; chains; refusals; t ls; }

run() {                 # run SIDE
    local start=$SECONDS folder=${!1}
    (cd "$folder" && everything) >"$scratch/$1" 2>"$scratch/$1.err"
    echo "qemu-tools: $(grep -c '^\$' "$scratch/$1") commands in ${folder%/*}, $((SECONDS - start)) s"
    if [ -s "$scratch/$1.err" ]; then
        echo "qemu-tools: unexpected messages:"; head -5 "$scratch/$1.err"
    fi
}
run reference &
run here
wait
if cmp -s "$scratch/here" "$scratch/reference" && cmp -s "$scratch/here.err" "$scratch/reference.err"; then
    echo "qemu-tools: $(qemu-img --version | head -1): equal"
    exit 0
fi
echo "qemu-tools: DIFFERENT (-: the reference, +: the folder under test)"
diff -U 4 "$scratch/reference" "$scratch/here" | sed 1,2d | head -"${QEMU_TOOLS_LINES:-80}"
[ -z "${QEMU_TOOLS_KEEP:-}" ] || echo "qemu-tools: transcripts are in $scratch"
exit 1
