//! How a pool is mounted, and the `-o` options that `mount(8)` and `fstab` give.

use std::path::PathBuf;

use fuser::MountOption;

use crate::error::{Error, Kind, Result};
use crate::vfs::BlocksPolicy;

/// Session threads where nothing else is said: requests are answered from memory, or wait for the
/// device.
pub const THREADS_DEFAULT: usize = 8;

/// Most session threads.
pub const THREADS_MAX: usize = 64;

/// How a pool is mounted.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Absolute path of the pool: what `mount` and `df` show as the source, and what the control
    /// channel tells.
    pub pool: PathBuf,
    /// Lets every user in, by the permissions of the files. Else only who mounts it.
    pub allow_other: bool,
    /// Refuses every change.
    pub read_only: bool,
    /// Session threads, 1 to [`THREADS_MAX`].
    pub threads: usize,
    /// Bytes that are read ahead of a reader in order, if another number than usual; 0: none.
    pub read_ahead: Option<u64>,
    /// What `st_blocks` tells.
    pub blocks: BlocksPolicy,
    /// Percent of use at which whoever mounts it warns, ascending: told on the control channel.
    pub marks: Vec<u8>,
    /// Further options as after `-o`, one per entry.
    pub extra: Vec<String>,
}

impl MountOptions {
    /// The usual way to mount the pool at `pool`, an absolute path.
    pub fn new(pool: impl Into<PathBuf>) -> Self {
        Self {
            pool: pool.into(),
            allow_other: false,
            read_only: false,
            threads: THREADS_DEFAULT,
            read_ahead: None,
            blocks: BlocksPolicy::default(),
            marks: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// Applies the options that are this program's, leaves those that are the kernel's in `extra`,
    /// and refuses unknown ones.
    pub(super) fn resolve(mut self) -> Result<Resolved> {
        let mut flags = Flags::default();
        for option in std::mem::take(&mut self.extra) {
            match option.as_str() {
                "allow_other" => self.allow_other = true,
                "ro" => self.read_only = true,
                "rw" => self.read_only = false,
                "blocks=logical" => self.blocks = BlocksPolicy::Logical,
                "blocks=allocated" => self.blocks = BlocksPolicy::Allocated,
                other => flags.set(other)?,
            }
        }
        if self.threads == 0 || self.threads > THREADS_MAX {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "a mount has 1 to {THREADS_MAX} threads: threads={}",
                    self.threads
                ),
            ));
        }
        let access = if self.read_only {
            MountOption::RO
        } else {
            MountOption::RW
        };
        let mut kernel = vec![
            MountOption::FSName(self.pool.to_string_lossy().into_owned()),
            // As an option of its own, because fuser sends `Subtype` only by its mount helper.
            MountOption::CUSTOM("subtype=nodupe".to_owned()),
            MountOption::DefaultPermissions,
            access,
        ];
        kernel.extend(flags.into_options());
        Ok(Resolved {
            options: self,
            kernel,
        })
    }
}

/// Options ready to be used.
#[derive(Debug)]
pub(super) struct Resolved {
    /// This program's.
    pub(super) options: MountOptions,
    /// The kernel's.
    pub(super) kernel: Vec<MountOption>,
}

/// Flags of the mount; the last of two that exclude each other counts.
#[derive(Debug, Default)]
struct Flags {
    dev: bool,
    suid: bool,
    noexec: bool,
    noatime: bool,
    sync: bool,
    dirsync: bool,
}

impl Flags {
    fn set(&mut self, option: &str) -> Result<()> {
        match option {
            "dev" => self.dev = true,
            "nodev" => self.dev = false,
            "suid" => self.suid = true,
            "nosuid" => self.suid = false,
            "exec" => self.noexec = false,
            "noexec" => self.noexec = true,
            "atime" | "relatime" => self.noatime = false,
            "noatime" => self.noatime = true,
            "sync" => self.sync = true,
            "async" => self.sync = false,
            "dirsync" => self.dirsync = true,
            // Always on, or for those who start us.
            "default_permissions" | "defaults" | "auto" | "noauto" | "nofail" | "_netdev" => {}
            other if other.starts_with("x-") => {}
            other => {
                return Err(Error::new(
                    Kind::Invalid,
                    format!(
                        "unknown mount option: option={other}; known are allow_other, ro, rw, \
                         blocks=logical, blocks=allocated, dev, suid, exec, noexec, noatime, \
                         sync, dirsync"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn into_options(self) -> Vec<MountOption> {
        let mut options = vec![
            if self.dev {
                MountOption::Dev
            } else {
                MountOption::NoDev
            },
            if self.suid {
                MountOption::Suid
            } else {
                MountOption::NoSuid
            },
        ];
        let rest = [
            (self.noexec, MountOption::NoExec),
            (self.noatime, MountOption::NoAtime),
            (self.sync, MountOption::Sync),
            (self.dirsync, MountOption::DirSync),
        ];
        options.extend(
            rest.into_iter()
                .filter_map(|(on, option)| on.then_some(option)),
        );
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(extra: &[&str]) -> Result<Resolved> {
        let mut options = MountOptions::new("/pool");
        options.extra = extra.iter().map(|&option| option.to_owned()).collect();
        options.resolve()
    }

    #[test]
    fn set_id_bits_and_devices_are_off_unless_asked_for() {
        let kernel = resolve(&[]).unwrap().kernel;
        assert!(kernel.contains(&MountOption::NoSuid) && kernel.contains(&MountOption::NoDev));
        assert!(kernel.contains(&MountOption::DefaultPermissions));
        let kernel = resolve(&["suid", "dev", "noexec"]).unwrap().kernel;
        assert!(kernel.contains(&MountOption::Suid) && kernel.contains(&MountOption::Dev));
        assert!(kernel.contains(&MountOption::NoExec));
    }

    #[test]
    fn the_last_of_two_options_counts_and_unknown_ones_do_not_pass() {
        let resolved = resolve(&["ro", "rw", "allow_other", "blocks=allocated", "x-any"]).unwrap();
        assert!(!resolved.options.read_only && resolved.options.allow_other);
        assert_eq!(resolved.options.blocks, BlocksPolicy::Allocated);
        let error = resolve(&["compress"]).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.to_string().contains("compress"));
    }
}
