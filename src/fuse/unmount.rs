//! The end of a mount.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{cannot, system};
use crate::error::Result;
use crate::sys;

/// Ends a mount, from any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Unmounter {
    dir: PathBuf,
    /// Device number of the mount, "major:minor": another one on `dir` is left alone.
    device: Option<String>,
}

impl Unmounter {
    /// For what was mounted on `dir` last.
    pub(super) fn of_newest(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            device: system::mounted_device(dir),
        }
    }

    /// Unmounts; [`mount`](super::mount) returns soon after. A mount that is in use is detached
    /// from the tree: nobody else gets in, and it ends when its last user closes what is open.
    /// Does nothing if it is unmounted already.
    pub fn unmount(&self) -> Result<()> {
        if system::mounted_device(&self.dir) != self.device {
            return Ok(());
        }
        let result = match sys::control::unmount(&self.dir, false) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                log::warn!(
                    "{} is in use: it is detached now and ends with its last user",
                    self.dir.display()
                );
                sys::control::unmount(&self.dir, true)
            }
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.ask_helper(),
            result => result,
        };
        match result {
            // Somebody else was faster.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result.map_err(|error| cannot("unmount", &self.dir, error)),
        }
    }

    /// Who is not root unmounts by the helper that mounted; lazily, so that it needs one call.
    fn ask_helper(&self) -> io::Result<()> {
        let status = Command::new("fusermount3")
            .args(["-u", "-z", "--"])
            .arg(&self.dir)
            .status()?;
        if !status.success() {
            return Err(io::Error::other(format!("fusermount3 ended with {status}")));
        }
        Ok(())
    }
}
