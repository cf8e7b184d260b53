#!/bin/bash
# POSIX semantics: the test program pjdfstest, about 400 cases, some as other users.
#
# usage: pjdfstest.sh [--ext4 | DIR]      as root; DIR mounted with --allow-other
set -u
. "$(dirname "$0")/common.sh"
[ "$(id -u)" = 0 ] || stop "needs root: part of the cases change users"
need setfacl
program=$(suite_program pjdfstest@0.2.2) || exit
work_in "${1:-}"
# Two users that own nothing. They must be able to reach the folder.
id nodupe-test >/dev/null 2>&1 || useradd --system --no-create-home nodupe-test || stop "cannot add a user"
chmod 755 "$work"
setpriv --reuid=nobody --clear-groups test -x "$work" || stop "other users cannot reach $work: mount with --allow-other, below folders that they may search"
cat >"$log.toml" <<'TOML'
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
allow_remount = false
naptime = 0.01
[dummy_auth]
entries = [["nobody", "nogroup"], ["nodupe-test", "nodupe-test"]]
TOML
cd / && timeout 600 "$program" --configuration-file "$log.toml" --path "$work" --secondary-fs /dev/shm >"$log" 2>&1
status=$?
rm -f "$log.toml"
while read -r name verdict; do
    case $verdict in
    ok) ok "$name" ;;
    FAILED) bad "$name" ;;
    skipped) skip ;;
    esac
done < <(sed -nE 's/^([a-z_0-9]+::[a-z_0-9:]+) +(ok|FAILED|skipped)$/\1 \2/p' "$log")
grep -q '^Summary' "$log" || { tail -5 "$log"; bad the-whole-run "ended early, exit $status"; }
summary
