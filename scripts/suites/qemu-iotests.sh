#!/bin/bash
# QEMU's own tests of its block layer, with the filesystem under test as their folder.
#
# usage: qemu-iotests.sh [--ext4 | DIR] [TEST...]
#   IOTESTS_FORMATS   formats (default: raw qcow2 vpc vmdk vhdx)
#   IOTESTS_GROUP     group of tests (default: quick)
# The tests come from Debian's source package of the QEMU that is installed. Debian's QEMU has no
# accelerator 'qtest', which the tests ask for: they get 'tcg' instead.
set -u
. "$(dirname "$0")/common.sh"
need qemu-img qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64 python3 dpkg-source
work_in "${1:-}"
[ $# = 0 ] || shift

version=$(dpkg-query -W -f '${source:Version}' qemu-utils) || stop "qemu-utils is no Debian package"
source=$SUITE_CACHE/qemu-${version//:/_}
if [ ! -d "$source" ]; then
    echo "$suite: fetching the source of qemu $version (once)" >&2
    # With lists of its own: the machine's need not have sources.
    apt=$SUITE_CACHE/apt
    mkdir -p "$apt/parts" "$apt/lists/partial" "$source.parts"
    for file in /etc/apt/sources.list.d/*.sources; do
        sed 's/^Types: deb$/Types: deb-src/' "$file" >"$apt/parts/${file##*/}"
    done
    sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >"$apt/sources.list" 2>/dev/null
    cat >"$apt/apt.conf" <<APT
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "$apt/parts";
Dir::State::lists "$apt/lists";
APT::Sandbox::User "root";
APT
    (cd "$source.parts" && export APT_CONFIG=$apt/apt.conf && { apt-get -qq update || true; } &&
        apt-get -qq source --download-only "qemu=$version" && dpkg-source --no-check -x ./*.dsc "$source") \
        >"$log" 2>&1 || { tail -5 "$log"; stop "no source of qemu $version"; }
    rm -rf "$source.parts"
fi

cat >"$SUITE_CACHE/qemu-tcg" <<'WRAPPER'
#!/bin/bash
arguments=()
for argument; do
    [ "$argument" != qtest ] || [ "${arguments[-1]:-}" != -accel ] || argument=tcg
    arguments+=("$argument")
done
exec qemu-system-x86_64 "${arguments[@]}"
WRAPPER
chmod +x "$SUITE_CACHE/qemu-tcg"
export TEST_DIR=$work QEMU_PROG=$SUITE_CACHE/qemu-tcg
SOCK_DIR=$(mktemp -d) && export SOCK_DIR
QEMU_IMG_PROG=$(command -v qemu-img) QEMU_IO_PROG=$(command -v qemu-io) QEMU_NBD_PROG=$(command -v qemu-nbd)
QSD_PROG=$(command -v qemu-storage-daemon)
export QEMU_IMG_PROG QEMU_IO_PROG QEMU_NBD_PROG QSD_PROG
[ $# -gt 0 ] || set -- -g "${IOTESTS_GROUP:-quick}"
for format in ${IOTESTS_FORMATS:-raw qcow2 vpc vmdk vhdx}; do
    (cd "$source/tests/qemu-iotests" && python3 check -tap "-$format" "$@") >"$log" 2>&1
    count=0
    while read -r verdict name rest; do
        count=$((count + 1))
        case "$verdict $rest" in
        *'# SKIP'*) skip ;;
        ok*) ok "$format/$name" ;;
        *) bad "$format/$name" ;;
        esac
    done < <(sed -nE 's/^(ok|not ok) ([a-z0-9]+ )?([^ ]+)(.*)$/\1 \3 \4/p' "$log" | sed 's/^not ok/not-ok/')
    [ $count -gt 0 ] || { tail -5 "$log"; bad "$format" "no test ran"; }
    find "$work" -mindepth 1 -delete
done
rm -rf "$SOCK_DIR"
summary
