//! The words behind `-o` of `mount`, as fstab and mount(8) write them.

use nodupe::fuse::THREADS_MAX;

use super::failure::{Failure, Result};
use super::size;
use super::warn;

/// What `-o` asks for; `None` and false: not mentioned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Words {
    pub(super) allow_other: bool,
    pub(super) read_only: Option<bool>,
    pub(super) cache_size: Option<u64>,
    /// True: `st_blocks` tells the blocks that are mapped, instead of the size of the file.
    pub(super) blocks_allocated: bool,
    pub(super) threads: Option<usize>,
    /// Bytes that are read ahead of a reader in order.
    pub(super) read_ahead: Option<u64>,
    /// Percent of use at which there are warnings.
    pub(super) warn: Option<Vec<u8>>,
    pub(super) nonempty: bool,
    /// Words for the kernel, in their order.
    pub(super) kernel: Vec<String>,
}

/// Reads one or more lists of words separated by commas; later words win.
pub(super) fn parse(lists: &[String]) -> Result<Words> {
    let mut words = Words::default();
    let all = lists.iter().flat_map(|list| list.split(','));
    for word in all.map(str::trim).filter(|word| !word.is_empty()) {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word, None),
        };
        let known = match value {
            None => set_flag(&mut words, name),
            Some(value) => set_value(&mut words, name, value)?,
        };
        if !known {
            return Err(Failure::usage(format!("unknown mount option '{word}'"))
                .hint("see the known ones: nodupe mount --help"));
        }
    }
    Ok(words)
}

fn set_flag(words: &mut Words, name: &str) -> bool {
    match name {
        "allow_other" => words.allow_other = true,
        "ro" => words.read_only = Some(true),
        "rw" => words.read_only = Some(false),
        "noatime" | "relatime" | "atime" | "dev" | "nodev" | "suid" | "nosuid" | "exec"
        | "noexec" | "sync" | "async" | "dirsync" => words.kernel.push(name.to_owned()),
        "nonempty" => words.nonempty = true,
        // Access times are not kept: nothing to choose.
        "diratime" | "nodiratime" | "norelatime" => {}
        // For mount(8), systemd and the init scripts. default_permissions is always on.
        "defaults"
        | "nofail"
        | "_netdev"
        | "user"
        | "users"
        | "noauto"
        | "auto"
        | "default_permissions" => {}
        _ => return name.starts_with("x-"),
    }
    true
}

fn set_value(words: &mut Words, name: &str, value: &str) -> Result<bool> {
    match name {
        "cache_size" => {
            let size = size::parse_cache_size(value);
            words.cache_size = Some(size.map_err(Failure::usage)?);
        }
        "blocks" => {
            words.blocks_allocated = match value {
                "logical" => false,
                "allocated" => true,
                _ => {
                    return Err(Failure::usage(format!(
                        "blocks={value}: it is 'logical' or 'allocated'"
                    )));
                }
            }
        }
        "threads" => match value.parse() {
            Ok(threads) if (1..=THREADS_MAX).contains(&threads) => words.threads = Some(threads),
            _ => {
                return Err(Failure::usage(format!(
                    "threads={value}: a number from 1 to {THREADS_MAX}"
                )));
            }
        },
        "read_ahead" => words.read_ahead = Some(size::parse(value).map_err(Failure::usage)?),
        "warn" => words.warn = Some(warn::parse_marks(value).map_err(Failure::usage)?),
        "comment" => {}
        _ => return Ok(name.starts_with("x-")),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(list: &str) -> Words {
        parse(&[list.to_owned()]).unwrap()
    }

    #[test]
    fn words_of_fstab_are_ignored() {
        let list = "defaults,nofail,_netdev,user,users,noauto,auto,x-systemd.automount,\
                    x-gvfs-name=a,comment=b,,rw";
        let words = Words {
            read_only: Some(false),
            ..Words::default()
        };
        assert_eq!(parsed(list), words);
    }

    #[test]
    fn words_about_access_times_are_taken() {
        let list = "noatime,nodiratime,diratime,relatime,norelatime";
        assert_eq!(parsed(list).kernel, ["noatime", "relatime"]);
    }

    #[test]
    fn later_words_win() {
        assert_eq!(parsed("ro,rw").read_only, Some(false));
        assert_eq!(parsed("noexec,exec").kernel, ["noexec", "exec"]);
        assert_eq!(
            parsed("cache_size=1G,cache_size=2G").cache_size,
            Some(2 << 30)
        );
        assert!(parsed("blocks=allocated").blocks_allocated);
        assert_eq!(parsed("threads=4").threads, Some(4));
        assert_eq!(parsed("read_ahead=1M").read_ahead, Some(1 << 20));
        assert_eq!(parsed("warn=70:85").warn, Some(vec![70, 85]));
    }

    #[test]
    fn unknown_words_are_usage_errors() {
        for list in [
            "foo",
            "ro=1",
            "threads=0",
            "read_ahead=far",
            "blocks=x",
            "cache_size=1",
            "warn=0",
            "cache=1G",
        ] {
            let failure = parse(&[list.to_owned()]).unwrap_err();
            assert!(failure.usage, "{list}");
        }
    }
}
