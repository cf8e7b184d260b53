//! Paths inside a pool that is open in this process: `/` separated, no links followed.

use nodupe::engine::{Attr, Pool};
use nodupe::units::Ino;

use super::failure::{Failure, Result};
use super::output::clean;

/// Finds what `path` names.
pub(super) fn find(pool: &Pool, path: &[u8]) -> Result<Attr> {
    let mut attr = pool
        .attr(Ino::ROOT)
        .map_err(|error| Failure::new("cannot read the root directory").because(&error))?;
    for name in parts(path) {
        attr = pool.lookup(attr.ino, name).map_err(|error| {
            let path = clean(&String::from_utf8_lossy(path));
            Failure::new(format!("cannot find {path} in the pool")).because(&error)
        })?;
    }
    Ok(attr)
}

/// The directory part and the last name of a path; `None` for the root.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let trimmed = path.len() - path.iter().rev().take_while(|&&b| b == b'/').count();
    let path = &path[..trimmed];
    let at = path.iter().rposition(|&b| b == b'/').map_or(0, |at| at + 1);
    let name = &path[at..];
    (!name.is_empty()).then_some((&path[..at], name))
}

fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_at_the_last_name() {
        assert_eq!(split(b"/a/b"), Some((&b"/a/"[..], &b"b"[..])));
        assert_eq!(split(b"/a//"), Some((&b"/"[..], &b"a"[..])));
        assert_eq!(split(b"a"), Some((&b""[..], &b"a"[..])));
        assert_eq!(split(b"/"), None);
        let found: Vec<&[u8]> = parts(b"//a/./b/").collect();
        assert_eq!(found, [b"a", b"b"]);
    }
}
