//! What the pool holds before an import, for `--dedupe`: the checksums of all files of the mount
//! that the caller may read. What many clones share is looked at once.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nodupe::error::Result;
use nodupe::transfer::Twins;
use nodupe::vfs::UNNAMED_PREFIX;

use super::super::blocks::{self, Seen, Tree};
use super::super::output::Output;
use super::super::unnamed;
use super::make;

/// Tells `twins` the blocks of the files of the pool mounted on `root`, which `tree` opens. What cannot be read is left
/// out: it is not shared with either.
pub(super) fn learn(root: &Path, tree: &Tree, twins: &Twins<'_>, output: Output) {
    let files = blocks::files_below(root, tree.device(), |_, _| {});
    let total = files.iter().map(|file| file.1.blocks() * 512).sum();
    let bar = output.progress("looking at the pool", total, true);
    let mut seen = Seen::default();
    for (path, metadata) in files {
        bar.inc(metadata.blocks() * 512);
        let name = path.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with(UNNAMED_PREFIX) {
            continue;
        }
        let Ok(file) = tree.open(&path, false) else {
            continue;
        };
        let Some(number) = twins.add_known(path.clone()) else {
            break;
        };
        let learned = blocks::fresh(&file, &mut seen, |at, _, sum| twins.learn(number, at, sum));
        if let Err(error) = learned {
            log::debug!("nothing is shared with {}: {error}", path.display());
        }
    }
    bar.finish_and_clear();
}

/// A clone without a name of a file of the pool, in which `dir` is.
pub(super) fn clone(dir: &Path, tree: &Tree, path: &Path) -> Result<File> {
    let from = tree.open(path, false)?;
    let to = unnamed::create(dir, 0o600, true)?;
    make::copy_all(&from, &to, u64::MAX)?;
    Ok(to)
}
