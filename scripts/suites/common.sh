# What the drivers in this folder share; sourced, not run.
#
# A driver counts its cases with ok, bad and skip, and ends with summary. A case named in
# SUITE.expected (one name per line, then the reason) may fail without failing the run; one that
# is named there and passes is reported, so that the list stays short. A reason that begins with
# "ext4:" says that the case fails there as well.
#
# Where a driver runs is its first argument:
#   (nothing)   a fresh pool, mounted with the release build; afterwards its check must be clean
#   --ext4      a fresh ext4 in a file, to compare with
#   DIR         whatever is mounted there
# Environment:
#   NODUPE        the program (default: target/release/nodupe)
#   SUITE_CACHE   where test programs are kept (default: ~/.cache/nodupe-suites)
#   SUITE_FOLDER  where pools and images are made (default: /var/tmp)
SUITE_CACHE=${SUITE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nodupe-suites}
SUITES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NODUPE=$(realpath -m "${NODUPE:-$SUITES/../../target/release/nodupe}")
PATH=$PATH:/usr/sbin:/sbin
suite=$(basename "$0" .sh)
passed=0 failed=0 skipped=0 expected=0
remount='' target='' home='' work='' log=''

stop() { echo "$suite: $*" >&2; exit 2; }

suite_program() {       # suite_program CRATE@VERSION: builds it if need be, prints its path
    local program=$SUITE_CACHE/bin/${1%@*}
    if [ ! -x "$program" ]; then
        mkdir -p "$SUITE_CACHE"
        echo "$suite: building $1 (once; log: $SUITE_CACHE/${1%@*}.log)" >&2
        nice cargo install "${1%@*}" --version "${1#*@}" --locked --root "$SUITE_CACHE" \
            >"$SUITE_CACHE/${1%@*}.log" 2>&1 || stop "cannot build $1, see $SUITE_CACHE/${1%@*}.log"
    fi
    echo "$program"
}

need() {                # need PROGRAM...
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || stop "$program is missing: run scripts/setup --suites"
    done
}

fresh_home() {          # makes $home, a folder that every user may search
    [ "$(id -u)" = 0 ] || stop "needs root to mount, or the folder of a mount as its argument"
    home=$(mktemp -d "${SUITE_FOLDER:-/var/tmp}/$suite.XXXXXX") && chmod 755 "$home" && mkdir "$home/mnt" ||
        stop "cannot make a folder in ${SUITE_FOLDER:-/var/tmp}"
    trap clean_up EXIT
}

mount_pool() {          # mount_pool POOL DIR [OPTIONS]
    "$NODUPE" mount "$1" "$2" --allow-other --cache-size 256M --log-file "$home/daemon.log" -o "suid,dev${3:+,$3}"
}

mount_target() {        # mount_target ARGUMENT: sets $target to a folder of the filesystem under test
    case ${1:-} in
    '')
        [ -x "$NODUPE" ] || stop "$NODUPE is missing: cargo build --release, or NODUPE=PATH"
        fresh_home
        "$NODUPE" create --quiet "$home/pool" --size 40G && mount_pool "$home/pool" "$home/mnt" || stop "cannot mount"
        target=$home/mnt remount="'$NODUPE' umount '$home/mnt' && '$NODUPE' mount '$home/pool' '$home/mnt' --allow-other"
        echo "$suite: on $("$NODUPE" --version), $(uname -sr)"
        ;;
    --ext4)
        fresh_home
        truncate -s 40G "$home/ext4" && mkfs.ext4 -qF "$home/ext4" && mount -o loop "$home/ext4" "$home/mnt" || stop "no ext4"
        chmod 755 "$home/mnt"
        target=$home/mnt remount="umount '$home/mnt' && mount -o loop '$home/ext4' '$home/mnt'"
        echo "$suite: on ext4, $(uname -sr)"
        ;;
    -*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *)
        [ -d "$1" ] || stop "$1 is not a folder"
        target=$(cd "$1" && pwd)
        ;;
    esac
}

work_in() {             # work_in ARGUMENT: makes $work, a folder of this run on the target
    mount_target "${1:-}"
    work=$target/$suite.$$
    mkdir "$work" || stop "$target is not writable"
    log=$(mktemp)
    trap clean_up EXIT
}

unmount() {             # unmount DIR: whoever looked at it (df, a monitor) may hold it for a moment
    local _
    for _ in $(seq 50); do
        mountpoint -q "$1" || return 0
        if [ -e "$home/pool" ]; then "$NODUPE" umount "$1" >"$home/umount.log" 2>&1; else umount "$1"; fi && return
        sleep 0.1
    done
    cat "$home/umount.log" 2>/dev/null
    return 1
}

clean_up() {
    local status=$?
    cd / || exit
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$log" ] || rm -f "$log" "$log".*
    if [ -n "$home" ]; then
        unmount "$home/mnt" || umount -l "$home/mnt"
        rm -rf "$home"
    fi
    exit $status
}

listed() { sed 's/#.*//' "$SUITES/$suite.expected" 2>/dev/null | awk '{print $1}' | grep -qxF -- "$1"; }
ok() {
    passed=$((passed + 1))
    if listed "$1" && [ -e "$home/pool" ]; then echo "$suite: $1 passes: take it off $suite.expected"; fi
}
skip() { skipped=$((skipped + 1)); }
bad() {                 # bad CASE WHY...
    if listed "$1"; then expected=$((expected + 1)); return; fi
    failed=$((failed + 1))
    echo "$suite: FAILED: $*"
}

check_pool() {          # the pool that the suite ran on is sound
    [ -e "$home/pool" ] || return 0
    cd / || exit
    rm -rf "$work"
    if unmount "$home/mnt" && "$NODUPE" check --quiet "$home/pool" >"$home/check.log" 2>&1; then return; fi
    tail -5 "$home/check.log"
    failed=$((failed + 1))
    echo "$suite: FAILED: check of the pool"
}

summary() {             # the last line, and the exit code
    check_pool
    echo "$suite: $passed passed, $failed failed, $expected failed as expected, $skipped skipped"
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
    exit
}
