//! The namespace: inodes against the names that lead to them, directories against their parents,
//! long values against their keys.
//!
//! Invariant: facts are gathered for a range of inode numbers at a time, which comes down when
//! they outgrow their share of memory; what is about one record alone is checked in the pass
//! whose range it belongs to, and so once.

use std::collections::BTreeMap;
use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::ondisk::extent::Root;
use crate::ondisk::inode::{
    Entry, FLAG_PINNED, Inode, InodeKind, KeyType, decode_entries, split_key,
};
use crate::ondisk::node::{TreeKind, VALUE_MAX};
use crate::ondisk::{get_u16, get_u32};
use crate::units::{Ino, Time};

use super::walk::ALL;
use super::{Checker, Subject, code};

/// Bytes of the facts about one inode, about.
const FACTS_COST: usize = 160;

/// What the whole namespace says about one inode.
#[derive(Clone, Debug, Default)]
struct Facts {
    inode: Option<Inode>,
    /// Entries that name it, and those that say that it is a directory.
    links: u32,
    /// A directory that names it; the last one.
    named_in: u64,
    /// Bits of the kinds that entries say it has.
    kinds: u16,
    /// Its own entries, and those of them that name directories.
    entries: u64,
    subdirectories: u32,
    orphan: bool,
    /// Pieces of long values belong to it.
    pieces: bool,
    /// Bytes of the target of a symlink.
    target: Option<u64>,
    /// Its generation, by the first clone that has it as origin.
    claimed: Option<u64>,
}

/// A long value that is being read, piece by piece.
#[derive(Debug, Default)]
struct Long {
    ino: u64,
    symlink: bool,
    /// Key of its first piece, without the inode and the type.
    base: u64,
    next: u64,
    bytes: u64,
    /// The last piece was full, so that another may follow.
    full: bool,
    /// What an attribute begins with: lengths and name.
    head: Vec<u8>,
}

/// One pass.
struct Pass {
    from: u64,
    to: u64,
    facts: BTreeMap<u64, Facts>,
    room: usize,
    long: Option<Long>,
    first: bool,
}

impl Pass {
    /// The facts about an inode, if this pass is about it.
    fn of(&mut self, ino: u64) -> Option<&mut Facts> {
        if ino < self.from || ino > self.to {
            return None;
        }
        if !self.facts.contains_key(&ino) && self.facts.len() >= self.room {
            // The largest number gives way, and the range ends before it.
            let (last, _) = self.facts.last_key_value()?;
            let gone = (*last).max(ino);
            self.to = gone - 1;
            self.facts.remove(&gone);
            if gone == ino {
                return None;
            }
        }
        Some(self.facts.entry(ino).or_default())
    }

    fn holds(&self, ino: u64) -> bool {
        (self.from..=self.to).contains(&ino)
    }
}

/// A directory and the one that names it.
type Parent = (u64, u64);

/// The keyed hash of a name, as `docs/format.md` has it.
pub(crate) fn name_hash(key: &[u8; 16], name: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(key);
    hasher.write(name);
    (hasher.finish() >> 16).max(1)
}

impl Checker<'_> {
    /// Checks all names and inodes.
    pub(super) fn check_names(&mut self) {
        let mut from = 0;
        let mut parents: Vec<Parent> = Vec::new();
        let mut logical = 0_u64;
        loop {
            let mut pass = Pass {
                from,
                to: u64::MAX,
                facts: BTreeMap::new(),
                room: (self.share(2) / FACTS_COST).max(8),
                long: None,
                first: from == 0,
            };
            let root = self.reader.sb.namespace;
            self.tree(
                root,
                TreeKind::Namespace,
                ALL,
                None,
                &mut |this, key, value| {
                    this.name_record(&mut pass, key, value);
                },
            );
            self.end_long(&mut pass);
            for (ino, facts) in std::mem::take(&mut pass.facts) {
                self.check_facts(ino, &facts);
                if let Some(inode) = &facts.inode {
                    logical = logical.wrapping_add(inode.size);
                    if inode.kind == InodeKind::Directory && facts.links > 0 {
                        parents.push((ino, facts.named_in));
                    }
                }
                if ino == Ino::ROOT.0 && facts.inode.is_some() {
                    parents.push((ino, ino));
                }
            }
            if parents.len() * size_of::<Parent>() > self.share(4) {
                self.too_little_memory("directories", parents.len() * size_of::<Parent>());
                return;
            }
            if pass.to == u64::MAX {
                break;
            }
            from = pass.to + 1;
        }
        self.check_reachable(&parents);
        self.check_sums_of_inodes(logical, &parents);
    }

    fn check_sums_of_inodes(&mut self, logical: u64, parents: &[Parent]) {
        let sb = self.reader.sb;
        if parents.iter().all(|parent| parent.0 != Ino::ROOT.0) {
            let text = "there is no root directory".into();
            self.find(code::NO_INODE, Subject::Pool, text);
        }
        if self.counts.inodes != sb.inodes {
            let text = format!(
                "there are {} inodes, the superblock says {}",
                self.counts.inodes, sb.inodes
            );
            self.find(code::INODE_COUNT, Subject::Pool, text);
        }
        if logical != sb.logical {
            let text = format!(
                "all files together have {logical} bytes, the superblock says {}",
                sb.logical
            );
            self.find(code::LOGICAL, Subject::Pool, text);
        }
    }

    fn name_record(&mut self, pass: &mut Pass, key: u128, value: &[u8]) {
        let (ino, kind, rest) = split_key(key);
        let shape = match KeyType::from_code(kind) {
            Some(KeyType::Inode) if ino > 0 && rest == 0 => Some(KeyType::Inode),
            Some(KeyType::Entries) if ino > 0 && rest > 0 && rest & 0xff == 0 => {
                Some(KeyType::Entries)
            }
            Some(kind @ (KeyType::Xattr | KeyType::Symlink)) if ino > 0 => Some(kind),
            Some(kind @ (KeyType::Orphan | KeyType::Detached)) if ino == 0 => Some(kind),
            _ => None,
        };
        match shape {
            None if pass.first => {
                let text = format!("namespace key {key:#x} cannot be");
                self.find(code::RECORD, Subject::Inode(ino), text);
            }
            None => {}
            Some(KeyType::Inode) => self.inode_record(pass, ino, value),
            Some(KeyType::Entries) => self.bucket(pass, ino, rest, value),
            Some(KeyType::Xattr) => self.piece(pass, ino, false, rest, value),
            Some(KeyType::Symlink) => self.piece(pass, ino, true, rest, value),
            Some(KeyType::Orphan) => {
                if let Some(facts) = pass.of(rest) {
                    facts.orphan = true;
                    if !value.is_empty() {
                        let text = format!("orphan record of inode {rest} has a value");
                        self.find(code::RECORD, Subject::Inode(rest), text);
                    }
                }
            }
            Some(KeyType::Detached) if pass.first => self.detached(rest, value),
            Some(KeyType::Detached) => {}
        }
    }

    fn detached(&mut self, serial: u64, value: &[u8]) {
        self.counts.detached += 1;
        let problem = match Root::decode(value) {
            Ok(root) if root.is_empty() => "it is empty".to_owned(),
            Ok(_) if serial >= self.reader.sb.next_detached => {
                let text = format!("detached map {serial} has a number not given out yet");
                return self.find(code::NUMBER, Subject::Pool, text);
            }
            Ok(_) => return,
            Err(error) => error.to_string(),
        };
        let text = format!("detached map {serial}: {problem}");
        self.find(code::RECORD, Subject::Pool, text);
    }

    fn inode_record(&mut self, pass: &mut Pass, ino: u64, value: &[u8]) {
        let inode = match Inode::decode(value) {
            Ok(inode) => inode,
            Err(error) => {
                if pass.holds(ino) {
                    let text = format!("inode {ino}: {error}");
                    self.find(code::RECORD, Subject::Inode(ino), text);
                }
                return;
            }
        };
        if let Some(facts) = pass.of(ino) {
            facts.inode = Some(inode);
        }
        if inode.origin != 0
            && let Some(facts) = pass.of(inode.origin)
        {
            let claimed = *facts.claimed.get_or_insert(inode.origin_generation);
            if claimed != inode.origin_generation {
                let text = format!("clones of inode {} disagree about it", inode.origin);
                self.find(code::LINEAGE, Subject::Inode(ino), text);
            }
        }
    }

    fn bucket(&mut self, pass: &mut Pass, dir: u64, rest: u64, value: &[u8]) {
        let mine = pass.holds(dir);
        let entries = match decode_entries(value) {
            Ok(entries) => entries,
            Err(error) => {
                if mine {
                    let text = format!("directory {dir}: {error}");
                    self.find(code::RECORD, Subject::Inode(dir), text);
                }
                return;
            }
        };
        if mine {
            self.check_bucket(dir, rest, &entries);
        }
        let directory = |entry: &&Entry| entry.kind == InodeKind::Directory;
        let subdirectories = entries.iter().filter(directory).count() as u32;
        if let Some(facts) = pass.of(dir) {
            facts.entries += entries.len() as u64;
            facts.subdirectories = facts.subdirectories.saturating_add(subdirectories);
        }
        for entry in entries {
            if let Some(facts) = pass.of(entry.ino.0) {
                facts.links = facts.links.saturating_add(1);
                facts.named_in = dir;
                facts.kinds |= 1 << entry.kind.code();
            }
        }
    }

    fn check_bucket(&mut self, dir: u64, rest: u64, entries: &[Entry]) {
        for (i, entry) in entries.iter().enumerate() {
            let name = entry.name.escape_ascii();
            if name_hash(&self.reader.sb.hash_key, &entry.name) << 8 != rest {
                let text = format!("directory {dir} has the name \"{name}\" in a wrong place");
                self.find(code::NAME, Subject::Inode(dir), text);
            }
            if entries[..i].iter().any(|other| other.name == entry.name) {
                let text = format!("directory {dir} has the name \"{name}\" twice");
                self.find(code::NAME, Subject::Inode(dir), text);
            }
        }
    }

    /// A piece of a target or an attribute. Pieces come in order; a gap is seen at the next one.
    fn piece(&mut self, pass: &mut Pass, ino: u64, symlink: bool, rest: u64, value: &[u8]) {
        if !pass.holds(ino) {
            return;
        }
        if let Some(facts) = pass.of(ino) {
            facts.pieces = true;
        }
        let continues = pass.long.as_ref().is_some_and(|long| {
            (long.ino, long.symlink, long.next) == (ino, symlink, rest) && long.full
        });
        if !continues {
            self.end_long(pass);
            if rest & 0xffff != 0 {
                let text = format!("a long value of inode {ino} has lost its beginning");
                return self.find(code::LONG_VALUE, Subject::Inode(ino), text);
            }
            pass.long = Some(Long {
                ino,
                symlink,
                base: rest,
                next: rest,
                ..Long::default()
            });
        }
        if let Some(long) = &mut pass.long {
            long.next += 1;
            long.bytes += value.len() as u64;
            long.full = value.len() == VALUE_MAX;
            if long.head.len() < VALUE_MAX {
                long.head.extend_from_slice(value);
            }
        }
    }

    fn end_long(&mut self, pass: &mut Pass) {
        let Some(long) = pass.long.take() else {
            return;
        };
        if long.symlink {
            if let Some(facts) = pass.of(long.ino) {
                facts.target = Some(long.bytes);
            }
            return;
        }
        let bad = |what: &str| format!("an extended attribute of inode {} {what}", long.ino);
        let problem = match long.head.len() {
            0..6 => Some(bad("is malformed")),
            _ => {
                let len = usize::from(get_u16(&long.head, 0));
                let whole = 6 + len as u64 + u64::from(get_u32(&long.head, 2));
                match long.head.get(6..6 + len) {
                    Some(name) if len > 0 && whole == long.bytes => {
                        let hash = name_hash(&self.reader.sb.hash_key, name) >> 8;
                        (hash << 16 != long.base).then(|| bad("is in a wrong place"))
                    }
                    _ => Some(bad("is cut")),
                }
            }
        };
        if let Some(text) = problem {
            self.find(code::LONG_VALUE, Subject::Inode(long.ino), text);
        }
    }

    /// Compares all that is known of one inode.
    fn check_facts(&mut self, ino: u64, facts: &Facts) {
        let subject = Subject::Inode(ino);
        let Some(inode) = &facts.inode else {
            if facts.links > 0 {
                let text = format!(
                    "directory {} names inode {ino}, which is not there",
                    facts.named_in
                );
                self.find(code::NO_INODE, subject, text);
            }
            if facts.entries > 0 {
                let text = format!("entries belong to {ino}, which is no directory");
                self.find(code::NO_INODE, subject, text);
            }
            if facts.orphan || facts.pieces {
                let text = format!("something belongs to inode {ino}, which is not there");
                self.find(code::NO_INODE, subject, text);
            }
            return;
        };
        self.counts.inodes += 1;
        self.counts.clones += u64::from(inode.origin != 0);
        self.check_kind(ino, inode, facts);
        self.check_links(ino, inode, facts);
        self.check_inode(ino, inode, facts);
        self.check_lineage(ino, inode, facts);
    }

    fn check_kind(&mut self, ino: u64, inode: &Inode, facts: &Facts) {
        let subject = Subject::Inode(ino);
        let own = 1 << inode.kind.code();
        if facts.kinds & !own != 0 {
            let text = format!(
                "directory {} says that inode {ino} is something else than {:?}",
                facts.named_in, inode.kind
            );
            self.find(code::ENTRY_KIND, subject, text);
        }
        if facts.entries > 0 && inode.kind != InodeKind::Directory {
            let text = format!("entries belong to {ino}, which is no directory");
            self.find(code::NO_INODE, subject, text);
        }
        if inode.kind == InodeKind::Directory && facts.links > 0 {
            if facts.links > 1 || ino == Ino::ROOT.0 {
                let text = format!("directory {ino} has {} names", facts.links);
                self.find(code::NAME, subject, text);
            }
            if inode.parent != facts.named_in {
                let text = format!(
                    "directory {ino} is in {}, but says {}",
                    facts.named_in, inode.parent
                );
                self.find(code::PARENT, subject, text);
            }
        }
    }

    fn check_links(&mut self, ino: u64, inode: &Inode, facts: &Facts) {
        let subject = Subject::Inode(ino);
        let expect = match inode.kind {
            InodeKind::Directory if facts.links > 0 || ino == Ino::ROOT.0 => {
                facts.subdirectories.saturating_add(2)
            }
            _ => facts.links,
        };
        if inode.nlink != expect {
            let text = format!(
                "inode {ino} has {expect} links, its record says {}",
                inode.nlink
            );
            self.find(code::NLINK, subject, text);
        }
        if facts.orphan != (inode.nlink == 0 || inode.flags & FLAG_PINNED != 0) {
            let text = format!("inode {ino} and the list of orphans disagree");
            self.find(code::ORPHAN, subject, text);
        }
        if inode.nlink == 0 && facts.entries > 0 {
            let text = format!("directory {ino} is gone, but has entries");
            self.find(code::ORPHAN, subject, text);
        }
    }

    fn check_inode(&mut self, ino: u64, inode: &Inode, facts: &Facts) {
        let subject = Subject::Inode(ino);
        let sb = self.reader.sb;
        // Its generation may be above the superblock's: a checkpoint that a full host held up was
        // counted when the inode was made, and after a crash the count begins lower again.
        if ino >= sb.next_ino {
            let text = format!("inode {ino} has a number not given out yet");
            self.find(code::NUMBER, subject, text);
        }
        let regular = inode.kind == InodeKind::Regular;
        let problem = if !regular && (!inode.root.is_empty() || inode.mapped > 0) {
            Some("has blocks, and is no file")
        } else if !regular && inode.flags != 0 {
            Some("is a clone in pieces, and no file")
        } else if inode.mode & !0o7777 != 0 {
            Some("has an impossible mode")
        } else if inode.kind == InodeKind::Symlink && facts.target != Some(inode.size) {
            Some("is a symlink whose target is cut")
        } else if inode.kind != InodeKind::Symlink && facts.target.is_some() {
            Some("has a target, and is no symlink")
        } else if inode.kind != InodeKind::Directory && inode.parent != 0 {
            Some("has a parent, and is no directory")
        } else if ino == Ino::ROOT.0 && inode.parent != ino {
            Some("is the root, and has a parent")
        } else {
            None
        };
        if let Some(problem) = problem {
            self.find(code::INODE, subject, format!("inode {ino} {problem}"));
        }
    }

    fn check_lineage(&mut self, ino: u64, inode: &Inode, facts: &Facts) {
        let problem = if inode.origin == 0 {
            let empty = inode.origin_generation == 0 && inode.origin_time == Time::default();
            (!empty).then_some("has no origin, but a date of it")
        } else if inode.origin >= self.reader.sb.next_ino
            || inode.origin_generation > self.reader.sb.generation
            || inode.kind != InodeKind::Regular
        {
            Some("has an origin that cannot be")
        } else {
            None
        };
        if let Some(problem) = problem {
            self.find(
                code::LINEAGE,
                Subject::Inode(ino),
                format!("inode {ino} {problem}"),
            );
        }
        if facts
            .claimed
            .is_some_and(|claimed| claimed != inode.generation)
        {
            let text = format!("clones of inode {ino} were made of another one");
            self.find(code::LINEAGE, Subject::Inode(ino), text);
        }
    }

    /// Every directory that has a name is reached from the root, and so not part of a circle.
    fn check_reachable(&mut self, parents: &[Parent]) {
        for ino in unreachable(parents) {
            let text = format!("directory {ino} cannot be reached from the root");
            self.find(code::UNREACHABLE, Subject::Inode(ino), text);
        }
    }
}

/// The directories of a sorted list that do not lead to the root.
pub(crate) fn unreachable(parents: &[Parent]) -> Vec<u64> {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        OnPath,
        Reached,
        Lost,
    }
    let mut states = vec![State::New; parents.len()];
    let find = |ino: u64| parents.binary_search_by_key(&ino, |parent| parent.0).ok();
    if let Some(root) = find(Ino::ROOT.0) {
        states[root] = State::Reached;
    }
    let mut path = Vec::new();
    for i in 0..parents.len() {
        let mut at = Some(i);
        let end = loop {
            match at {
                Some(i) if states[i] == State::New => {
                    states[i] = State::OnPath;
                    path.push(i);
                    at = find(parents[i].1);
                }
                Some(i) if states[i] == State::Reached => break State::Reached,
                _ => break State::Lost,
            }
        };
        path.drain(..).for_each(|i| states[i] = end);
    }
    let lost = parents.iter().zip(&states);
    lost.filter(|(_, state)| **state == State::Lost)
        .map(|(parent, _)| parent.0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_and_what_hangs_on_them_are_unreachable() {
        let parents = [(1, 1), (2, 1), (3, 2), (5, 6), (6, 5), (7, 6), (8, 99)];
        assert_eq!(unreachable(&parents), [5, 6, 7, 8]);
        assert_eq!(unreachable(&[(2, 2)]), [2]);
        assert!(unreachable(&[]).is_empty());
    }
}
