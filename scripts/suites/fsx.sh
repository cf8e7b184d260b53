#!/bin/bash
# Random operations on one file, compared with a model in memory: the test program fsx.
#
# usage: fsx.sh [--ext4 | DIR]
#   FSX_SEEDS   seeds to run (default: 1 2 3 4)
#   FSX_OPS     operations of each run (default: 6000)
#   FSX_HOURS   runs new seeds until so many hours are over, instead
# Four mixes: every operation at any offset; what a guest's disk sees; mapped memory against
# write and truncate; a disk of fixed size in sectors. Each mix runs with each seed.
set -u
. "$(dirname "$0")/common.sh"
program=$(suite_program fsx@0.3.2) || exit
work_in "${1:-}"

mix_any() { cat <<'TOML'
flen = 262144
[opsize]
max = 65536
align = 1
[weights]
read = 10
write = 10
mapread = 10
mapwrite = 10
truncate = 5
close_open = 1
invalidate = 1
fsync = 1
fdatasync = 1
punch_hole = 5
copy_file_range = 5
posix_fallocate = 3
posix_fadvise = 1
sendfile = 2
TOML
}
mix_guest() { cat <<'TOML'
flen = 33554432
[opsize]
max = 1048576
align = 4096
[weights]
read = 20
write = 30
mapread = 0
mapwrite = 0
truncate = 1
close_open = 1
fsync = 2
fdatasync = 8
punch_hole = 8
copy_file_range = 2
TOML
}
mix_mapped() { cat <<'TOML'
flen = 1048576
[opsize]
max = 131072
align = 1
[weights]
read = 10
write = 10
mapread = 20
mapwrite = 20
truncate = 10
close_open = 2
invalidate = 4
fsync = 2
TOML
}
mix_sectors() { cat <<'TOML'
flen = 8388608
blockmode = true
nosizechecks = true
[opsize]
max = 262144
align = 512
[weights]
read = 15
write = 15
mapread = 5
mapwrite = 5
truncate = 0
close_open = 0
posix_fallocate = 0
punch_hole = 5
copy_file_range = 5
fsync = 2
fdatasync = 2
TOML
}

operations=${FSX_OPS:-6000} last=''
for mix in any guest mapped sectors; do "mix_$mix" >"$log.$mix"; done

run_seed() {            # run_seed SEED: all mixes with it
    last=$1
    for mix in any guest mapped sectors; do
        file=$work/$mix.$1
        [ $mix != sectors ] || truncate -s 8M "$file"
        if timeout 600 "$program" -f "$log.$mix" -N "$operations" -S "$1" -P "$(dirname "$log")" "$file" >"$log" 2>&1
        then ok "$mix.$1"; else
            status=$?
            tail -20 "$log"
            bad "$mix.$1" "exit $status (again: FSX_SEEDS=$1 FSX_OPS=$operations $0)"
        fi
        rm -f "$file"
    done
}

if [ -n "${FSX_HOURS:-}" ]; then
    limit=$(awk "BEGIN {print int($FSX_HOURS * 3600)}")
    for ((seed = $(date +%s); SECONDS < limit; seed++)); do run_seed "$seed"; done
else
    for seed in ${FSX_SEEDS:-1 2 3 4}; do run_seed "$seed"; done
fi
echo "$suite: $SECONDS s, $operations operations each, last seed $last"
summary
