//! What can be seen of a filesystem, of a pool or of the model: to compare them at once by one
//! number, and in words where they differ.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::mem::discriminant;

use nodupe::engine::{FileKind, Pool};
use nodupe::error::{Kind, Result};
use nodupe::units::Ino;

use super::content::{PAGE, digest_bytes};
use super::model::{Id, Model, ROOT};

/// Bytes up to which a file is read whole, holes too; of larger ones only the data.
const READ_WHOLE_MAX: u64 = 2 * 1024 * 1024;
/// Bytes of one read.
const READ_LEN: usize = 256 * 1024;

/// One name and what it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    /// Index of the first entry that names the same inode.
    first: usize,
    kind: FileKind,
    mode: u32,
    owner: (u32, u32),
    rdev: u32,
    /// Links of anything but a directory.
    nlink: u32,
    /// Bytes of a file.
    size: u64,
    /// Digest of the bytes of a file.
    digest: u64,
    target: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// All names, parents before children, siblings in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) entries: Vec<Entry>,
}

impl View {
    /// Everything that the pool shows, through its public interface.
    pub(crate) fn of_pool(pool: &Pool) -> Result<View> {
        let mut walk = PoolWalk {
            pool,
            view: View::default(),
            firsts: BTreeMap::new(),
        };
        walk.visit(Vec::new(), Ino::ROOT)?;
        Ok(walk.view)
    }

    /// Everything that the model shows.
    pub(crate) fn of_model(model: &Model) -> View {
        let mut view = View::default();
        visit_model(model, Vec::new(), ROOT, &mut view, &mut BTreeMap::new());
        view
    }

    /// Equal views have equal digests.
    pub(crate) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for entry in &self.entries {
            entry.path.hash(&mut hasher);
            (entry.first, discriminant(&entry.kind)).hash(&mut hasher);
            (entry.mode, entry.owner, entry.rdev, entry.nlink).hash(&mut hasher);
            (entry.size, entry.digest, &entry.target, &entry.xattrs).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// The differences in words, one per line: what `self` has and `other` should have.
    pub(crate) fn differences(&self, other: &View) -> Vec<String> {
        let mut lines = Vec::new();
        let theirs: BTreeMap<_, _> = other.entries.iter().map(|e| (&e.path, e)).collect();
        let ours: BTreeMap<_, _> = self.entries.iter().map(|e| (&e.path, e)).collect();
        for (path, wanted) in &theirs {
            match ours.get(*path) {
                None => lines.push(format!("{} is missing", show(path))),
                Some(got) => got.difference(wanted, &mut lines),
            }
        }
        for path in ours.keys().filter(|path| !theirs.contains_key(*path)) {
            lines.push(format!("{} should not exist", show(path)));
        }
        lines
    }
}

impl Entry {
    fn difference(&self, wanted: &Entry, lines: &mut Vec<String>) {
        let mut line = String::new();
        let mut field = |name, got: &dyn std::fmt::Debug, wanted: &dyn std::fmt::Debug| {
            let (got, wanted) = (format!("{got:?}"), format!("{wanted:?}"));
            if got != wanted {
                write!(line, " {name}={got} instead of {wanted}").expect("a string takes all");
            }
        };
        field("first", &self.first, &wanted.first);
        field("kind", &self.kind, &wanted.kind);
        field("mode", &self.mode, &wanted.mode);
        field("owner", &self.owner, &wanted.owner);
        field("rdev", &self.rdev, &wanted.rdev);
        field("nlink", &self.nlink, &wanted.nlink);
        field("size", &self.size, &wanted.size);
        field("digest", &self.digest, &wanted.digest);
        field("target", &show(&self.target), &show(&wanted.target));
        field("xattrs", &xattrs(self), &xattrs(wanted));
        if !line.is_empty() {
            lines.push(format!("{}:{line}", show(&self.path)));
        }
    }
}

fn xattrs(entry: &Entry) -> Vec<(String, usize, u64)> {
    let digest = |value: &[u8]| {
        let mut hasher = DefaultHasher::new();
        value.hash(&mut hasher);
        hasher.finish()
    };
    let listed = entry.xattrs.iter();
    listed
        .map(|(name, value)| (show(name), value.len(), digest(value)))
        .collect()
}

/// A path or name for people, long ones cut.
pub(crate) fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() <= 80 {
        return text;
    }
    format!("{}...({} bytes)", &text[..60], bytes.len())
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    [path, b"/", name].concat()
}

fn visit_model(
    model: &Model,
    path: Vec<u8>,
    id: Id,
    view: &mut View,
    firsts: &mut BTreeMap<Id, usize>,
) {
    let node = model.node(id);
    let index = view.entries.len();
    view.entries.push(Entry {
        path: path.clone(),
        first: *firsts.entry(id).or_insert(index),
        kind: node.kind,
        mode: node.mode,
        owner: (node.uid, node.gid),
        rdev: node.rdev,
        nlink: if node.is_dir() { 0 } else { node.nlink },
        size: node.content.size(),
        digest: node.content.digest(),
        target: node.target.clone(),
        xattrs: node.xattrs.clone(),
    });
    for (name, child) in &node.entries {
        visit_model(model, join(&path, name), *child, view, firsts);
    }
}

struct PoolWalk<'a> {
    pool: &'a Pool,
    view: View,
    firsts: BTreeMap<Ino, usize>,
}

impl PoolWalk<'_> {
    fn visit(&mut self, path: Vec<u8>, ino: Ino) -> Result<()> {
        let attr = self.pool.attr(ino)?;
        assert_eq!(attr.ino, ino, "{}: attr() of another inode", show(&path));
        let index = self.view.entries.len();
        let is_file = attr.kind == FileKind::Regular;
        let mut entry = Entry {
            path: path.clone(),
            first: *self.firsts.entry(ino).or_insert(index),
            kind: attr.kind,
            mode: attr.mode,
            owner: (attr.uid, attr.gid),
            rdev: attr.rdev,
            nlink: attr.nlink,
            size: if is_file { attr.size } else { 0 },
            digest: 0,
            target: Vec::new(),
            xattrs: BTreeMap::new(),
        };
        for name in self.pool.list_xattrs(ino)? {
            let value = self.pool.xattr(ino, &name)?;
            let again = entry.xattrs.insert(name, value);
            assert!(again.is_none(), "{}: xattr listed twice", show(&path));
        }
        match attr.kind {
            FileKind::Regular => entry.digest = digest_file(self.pool, ino, attr.size)?,
            FileKind::Symlink => entry.target = self.pool.read_link(ino)?,
            FileKind::Directory => entry.nlink = 0,
            _ => {}
        }
        self.view.entries.push(entry);
        if attr.kind == FileKind::Directory {
            for (name, child) in list(self.pool, ino)? {
                let found = self.pool.lookup(ino, &name)?;
                assert_eq!(found.ino, child, "{}: lookup differs", show(&name));
                if found.kind == FileKind::Directory {
                    assert_eq!(found.parent, ino, "{}: wrong parent", show(&name));
                }
                self.visit(join(&path, &name), child)?;
            }
        }
        Ok(())
    }
}

/// All entries of a directory by name, read in small pieces.
pub(crate) fn list(pool: &Pool, dir: Ino) -> Result<BTreeMap<Vec<u8>, Ino>> {
    let mut entries = BTreeMap::new();
    let mut cookie = 0;
    loop {
        let piece = pool.read_dir(dir, cookie, 5)?;
        let Some(last) = piece.last() else {
            return Ok(entries);
        };
        cookie = last.cookie;
        for entry in piece {
            let again = entries.insert(entry.name, entry.ino);
            assert!(again.is_none(), "a name is listed twice in {dir}");
        }
    }
}

fn digest_file(pool: &Pool, ino: Ino, size: u64) -> Result<u64> {
    let mut digest = 0;
    let mut offset = 0;
    let mut buffer = Vec::with_capacity(READ_LEN);
    while offset < size {
        let mut end = size;
        if size > READ_WHOLE_MAX {
            let data = match pool.seek_data(ino, offset) {
                Ok(data) => data,
                Err(error) if error.kind() == Kind::NoSuchOffset => break,
                Err(error) => return Err(error),
            };
            end = pool.seek_hole(ino, data)?;
            assert!(
                offset <= data && data < end && end <= size,
                "data {data}..{end} behind {offset} ino={ino}"
            );
            offset = data / PAGE as u64 * PAGE as u64;
        }
        while offset < end {
            let len = READ_LEN.min((end - offset).next_multiple_of(PAGE as u64) as usize);
            buffer.clear();
            pool.read(ino, offset, len, &mut buffer)?;
            let wanted = (size - offset).min(len as u64);
            assert_eq!(buffer.len() as u64, wanted, "short read ino={ino}");
            digest = digest_bytes(digest, offset, &buffer);
            offset += len as u64;
        }
    }
    Ok(digest)
}
