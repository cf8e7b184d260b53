//! Which records of a journal still have something to act on, once a repair could not save all.
//!
//! Invariant: a record that is let through leaves the names as sound as they were: what it names
//! is there, and no directory comes to be inside itself.

use crate::error::{Error, Kind, Result};
use crate::ondisk::record::Record;
use crate::units::Ino;

use super::apply::RENAME_EXCHANGE;
use super::meta::Meta;

/// Directories above each other that are followed.
const DEPTH_MAX: usize = 1 << 16;

/// Refuses a record about names that has nothing to act on. Others say so themselves before they
/// change anything.
pub(crate) fn can_apply(meta: &Meta, record: &Record) -> Result<()> {
    let gone = || Error::new(Kind::NotFound, "what a record is about was lost");
    let named = |dir: Ino, name: &[u8]| {
        let entry = meta.entry(dir, name)?.ok_or_else(gone)?;
        meta.inode(entry.ino)?;
        Ok(entry)
    };
    match record {
        Record::Create { dir, ino, .. } => {
            meta.directory(*dir)?;
            match meta.inode(*ino) {
                Ok(_) => Err(gone()),
                Err(_) => Ok(()),
            }
        }
        Record::Link { ino, dir, .. } => {
            meta.directory(*dir)?;
            meta.inode(*ino).map(drop)
        }
        Record::Unlink { dir, name, .. } => {
            meta.directory(*dir)?;
            let entry = named(*dir, name)?;
            match meta.entries(entry.ino, 0, 1)?.is_empty() {
                true => Ok(()),
                false => Err(gone()), // a directory that should have been empty by now
            }
        }
        Record::Rename {
            dir,
            name,
            new_dir,
            new_name,
            mode,
            ..
        } => {
            meta.directory(*dir)?;
            meta.directory(*new_dir)?;
            let moved = named(*dir, name)?;
            is_apart(meta, moved.ino, *new_dir)?;
            if meta.entry(*new_dir, new_name)?.is_some() {
                let target = named(*new_dir, new_name)?;
                is_apart(meta, target.ino, *dir)?;
                if *mode != RENAME_EXCHANGE && !meta.entries(target.ino, 0, 1)?.is_empty() {
                    return Err(gone());
                }
            }
            Ok(())
        }
        Record::SetXattr { ino, .. } | Record::RemoveXattr { ino, .. } => {
            meta.inode(*ino).map(drop)
        }
        _ => Ok(()),
    }
}

/// Fails if `dir` is `ino` or lies below it.
fn is_apart(meta: &Meta, ino: Ino, dir: Ino) -> Result<()> {
    let mut at = dir;
    for _ in 0..DEPTH_MAX {
        if at == ino {
            return Err(Error::new(
                Kind::Invalid,
                "a directory would be inside itself",
            ));
        }
        if at == Ino::ROOT {
            return Ok(());
        }
        at = Ino(meta.directory(at)?.parent);
    }
    Err(Error::corrupt("directories lead in a circle"))
}
