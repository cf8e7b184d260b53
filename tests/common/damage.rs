//! Looking at a pool on a device that was damaged: each thing must be right or an error, and
//! nothing may be silently gone or other than it was.

use std::collections::BTreeSet;
use std::sync::Arc;

use nodupe::device::SimDevice;
use nodupe::engine::{FileKind, Pool};
use nodupe::error::Kind;
use nodupe::units::Ino;

use super::content::{Content, PAGE};
use super::crash::Verdict;
use super::history::open;
use super::model::{Id, Model, Node, ROOT};
use super::view::show;

/// What a look at a damaged pool gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Errors in place of an answer.
    pub(crate) errors: usize,
    /// Right answers.
    pub(crate) right: usize,
    /// True if the pool did not even open.
    pub(crate) refused: bool,
}

/// Opens the pool and asks for everything that the model has. An error of kind `Corrupt` or `Io`
/// is an answer, wrong bytes and missing names are not.
pub(crate) fn look(device: &Arc<SimDevice>, cache_size: u64, model: &Model) -> Verdict<Look> {
    let mut look = Look::default();
    let pool = match open(device, cache_size) {
        Ok(pool) => pool,
        Err(error) => {
            assert!(!error.to_string().is_empty(), "an error without words");
            look.refused = true;
            return Ok(look);
        }
    };
    look_at_dir(&pool, model, ROOT, Ino::ROOT, &mut look)?;
    Ok(look)
}

/// Takes an answer: the value, `None` for an error that a damaged device may give.
fn answer<T>(result: nodupe::error::Result<T>, what: &str, look: &mut Look) -> Verdict<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Io) => {
            look.errors += 1;
            Ok(None)
        }
        Err(error) => Err(format!("{what}: {:?}: {error}", error.kind())),
    }
}

fn look_at_dir(pool: &Pool, model: &Model, dir: Id, ino: Ino, look: &mut Look) -> Verdict {
    let node = model.node(dir);
    let listed = super::view::list(pool, ino);
    if let Some(listed) = answer(listed, &format!("list of {dir}"), look)? {
        if !listed.keys().eq(node.entries.keys()) {
            return Err(format!("directory {dir} lists other names"));
        }
        look.right += 1;
    }
    for (name, child) in &node.entries {
        let what = format!("{} in {dir}", show(name));
        let Some(attr) = answer(pool.lookup(ino, name), &what, look)? else {
            continue;
        };
        let node = model.node(*child);
        let is_file = attr.kind == FileKind::Regular;
        if attr.kind != node.kind || (is_file && attr.size != node.content.size()) {
            return Err(format!("{what} has other attributes"));
        }
        look.right += 1;
        look_at_xattrs(pool, node, attr.ino, &what, look)?;
        match attr.kind {
            FileKind::Directory => look_at_dir(pool, model, *child, attr.ino, look)?,
            FileKind::Regular => look_at_file(pool, &node.content, attr.ino, &what, look)?,
            FileKind::Symlink => {
                if let Some(target) = answer(pool.read_link(attr.ino), &what, look)?
                    && target != node.target
                {
                    return Err(format!("{what} points elsewhere"));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn look_at_xattrs(pool: &Pool, node: &Node, ino: Ino, what: &str, look: &mut Look) -> Verdict {
    let Some(names) = answer(pool.list_xattrs(ino), what, look)? else {
        return Ok(());
    };
    let names: BTreeSet<_> = names.into_iter().collect();
    if !names.iter().eq(node.xattrs.keys()) {
        return Err(format!("{what} has other xattrs"));
    }
    for (name, wanted) in &node.xattrs {
        if let Some(value) = answer(pool.xattr(ino, name), what, look)?
            && value != *wanted
        {
            return Err(format!("{what} has another value of {}", show(name)));
        }
    }
    Ok(())
}

/// Reads the data pages one by one, so that one damaged block hides no other.
fn look_at_file(pool: &Pool, content: &Content, ino: Ino, what: &str, look: &mut Look) -> Verdict {
    let first_hole = (0..).find(|page| !content.data_pages().any(|data| data == *page));
    for page in content.data_pages().chain(first_hole) {
        let offset = page * PAGE as u64;
        let wanted = content.read(offset, PAGE);
        let len = content.size().saturating_sub(offset).min(PAGE as u64) as usize;
        let mut bytes = Vec::new();
        let result = pool.read(ino, offset, PAGE, &mut bytes);
        if answer(result, what, look)?.is_none() {
            continue;
        }
        if bytes[..] != wanted[..len] {
            return Err(format!("{what}: wrong bytes at {offset}"));
        }
        look.right += 1;
    }
    Ok(())
}

/// Addresses of the blocks that are not zeros.
pub(crate) fn used_blocks(device: &SimDevice) -> Vec<u64> {
    device.used()
}

/// What the pool shows must be one of the states of `models`, the newest last, and for the rest
/// errors.
pub(crate) fn look_for_any(
    device: &SimDevice,
    cache_size: u64,
    models: &[&Model],
) -> Verdict<Look> {
    let mut first_error = None;
    for model in models.iter().rev() {
        let device = Arc::new(device.fork(0));
        match look(&device, cache_size, model) {
            Ok(look) => return Ok(look),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or_default())
}
