//! Cloning files and whole directories under new names: planned as records first, so that all of
//! it happens, or nothing.
//!
//! Invariants:
//!
//! 1. Everything is queued for the journal at once: no crash leaves half a tree.
//! 2. Hard links within the source are hard links within the clone.

use std::collections::HashMap;

use crate::error::{Error, Kind, Result};
use crate::ondisk::inode::{FLAG_PINNED, InodeKind};
use crate::ondisk::record::Record;
use crate::units::{Ino, Time};

use super::apply::{blocks_of, load};
use super::meta::Meta;
use super::names::{
    DEPTH_MAX, attr_from, create_record, from_disk, is_within, living_directory, taken,
};
use super::namespace::check_name;
use super::pool::Pool;
use super::stage::{Stage, StageFile};
use super::types::{Attr, FileKind, NewNode};

impl Pool {
    /// Clones a file or a whole directory to each of `names` in directory `dir`, all or none, in
    /// one instant. `owner`: uid and gid of what is made; `None` keeps the source's.
    ///
    /// # Errors
    /// `Exists` if a name is taken; `Invalid` if `dir` lies within the source; `TooLarge` if the
    /// tree is too large to be journaled at once.
    pub fn clone_tree(
        &self,
        src: Ino,
        dir: Ino,
        names: &[Vec<u8>],
        owner: Option<(u32, u32)>,
        now: Time,
    ) -> Result<()> {
        self.clone_tree_if(src, dir, names, owner, now, &|_| Ok(()))
    }

    /// As [`clone_tree`](Self::clone_tree), if `allows` passes each inode of the tree, as it is at
    /// the instant of the clone: what was looked at before may have been replaced.
    ///
    /// # Errors
    /// As [`clone_tree`](Self::clone_tree), and those of `allows`.
    pub fn clone_tree_if(
        &self,
        src: Ino,
        dir: Ino,
        names: &[Vec<u8>],
        owner: Option<(u32, u32)>,
        now: Time,
        allows: &dyn Fn(&Attr) -> Result<()>,
    ) -> Result<()> {
        names.iter().try_for_each(|name| check_name(name))?;
        let mut distinct: Vec<_> = names.iter().collect();
        distinct.sort();
        distinct.dedup();
        if distinct.len() != names.len() {
            return Err(Error::new(Kind::Invalid, "a name is given twice"));
        }
        self.begin_change()?;
        // What is staged is copied block by block when it is destaged, once for each clone. So
        // as much as possible gets its place before.
        if self.attr(src)?.kind == FileKind::Directory {
            self.destage_all()?;
        } else if self.attr(src)?.kind == FileKind::Regular {
            let _gate = self.gate.read();
            let _owned = self.own_file(src);
            self.destage_file(src)?;
        }
        let most = self.limits.pending_bytes;
        self.transact(|meta, stage| {
            self.check_room()?;
            living_directory(meta, dir)?;
            if is_within(meta, dir, src)? {
                return Err(Error::new(
                    Kind::Invalid,
                    "a directory cannot be cloned into itself",
                ));
            }
            let next = meta.next_ino;
            let records = Vec::new();
            let mut plan = TreePlan {
                owner,
                now,
                next,
                records,
                bytes: 0,
                most,
                staged: 0,
                allows,
            };
            for name in names {
                if meta.entry(dir, name)?.is_some() {
                    return Err(taken(name));
                }
                let mut links = HashMap::new();
                plan.add(meta, stage, src, dir, name, &mut links, 0)?;
            }
            self.check_room_for(plan.staged)?;
            Ok((plan.records, ()))
        })
    }
}

/// Collects the records that clone a tree.
struct TreePlan<'a> {
    owner: Option<(u32, u32)>,
    now: Time,
    /// The next inode number.
    next: u64,
    records: Vec<Record>,
    bytes: usize,
    /// Bytes of records that one batch may hold.
    most: usize,
    /// Staged blocks that the clones will share.
    staged: u64,
    /// Refuses what must not be cloned.
    allows: &'a dyn Fn(&Attr) -> Result<()>,
}

impl TreePlan<'_> {
    #[allow(clippy::too_many_arguments)]
    fn add(
        &mut self,
        meta: &Meta,
        stage: &Stage,
        src: Ino,
        dir: Ino,
        name: &[u8],
        links: &mut HashMap<u64, Ino>,
        depth: usize,
    ) -> Result<()> {
        if let Some(ino) = links.get(&src.0) {
            let (ino, now) = (*ino, self.now);
            return self.push(Record::Link {
                ino,
                dir,
                name: name.into(),
                now,
            });
        }
        let inode = load(meta, stage, src)?;
        (self.allows)(&attr_from(src, &inode, stage))?;
        let ino = Ino(self.next);
        self.next += 1;
        if inode.nlink > 1 && inode.kind != InodeKind::Directory {
            links.insert(src.0, ino);
        }
        let target = if inode.kind == InodeKind::Symlink {
            meta.target(src)?
        } else {
            Vec::new()
        };
        let (uid, gid) = self.owner.unwrap_or((inode.uid, inode.gid));
        let node = NewNode {
            kind: from_disk(inode.kind),
            mode: u32::from(inode.mode),
            uid,
            gid,
            rdev: inode.rdev,
            target: &target,
        };
        let now = self.now;
        self.push(create_record(meta, dir, name, ino, &node, now))?;
        for (name, value) in meta.xattrs(src)? {
            self.push(Record::SetXattr {
                ino,
                name,
                value,
                now,
            })?;
        }
        if inode.kind == InodeKind::Regular {
            self.staged += stage.file(src).map_or(0, StageFile::blocks);
            let size = inode.size;
            self.push(Record::Clone {
                src,
                dst: ino,
                size,
                pinned: false,
                now,
            })?;
            if inode.flags & FLAG_PINNED != 0 {
                // What the source does not show yet, the clone never will. It shows whole blocks.
                let block = blocks_of(size);
                self.push(Record::Punch {
                    ino,
                    block,
                    count: u64::MAX - block,
                    now,
                })?;
            }
        }
        if inode.kind == InodeKind::Directory {
            if depth >= DEPTH_MAX / 16 {
                return Err(Error::new(
                    Kind::TooLarge,
                    "directories are nested too deeply",
                ));
            }
            for (_, entry) in meta.entries(src, 0, usize::MAX)? {
                self.add(meta, stage, entry.ino, ino, &entry.name, links, depth + 1)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, record: Record) -> Result<()> {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        self.bytes += bytes.len() + 96;
        if self.bytes > self.most {
            return Err(Error::new(
                Kind::TooLarge,
                "the tree is too large to be cloned at once; clone parts of it, or fewer",
            ));
        }
        self.records.push(record);
        Ok(())
    }
}
