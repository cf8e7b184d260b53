//! Operations of every kind on three files, for tests that try all short sequences of them.

use nodupe::device::SplitMix64;
use nodupe::engine::{FileKind, RenameMode};

use super::generate::random_bytes;
use super::history::Op;
use super::model::ROOT;

/// The operations of the exhaustive test, on the files that [`prepare`] makes.
pub(crate) fn operations(rng: &mut SplitMix64) -> Vec<Op> {
    const A: usize = 1;
    const B: usize = 2;
    const DIR: usize = 3;
    let mut bytes = |len| random_bytes(rng, len);
    vec![
        Op::Write(A, 100, bytes(300)),
        Op::Write(A, 4096, bytes(8192)),
        Op::Write(B, 0, bytes(65536)),
        Op::Write(A, 0, vec![0; 8192]),
        Op::Truncate(A, 5000),
        Op::Truncate(B, 40000),
        Op::Punch(A, 3000, 9000),
        Op::CloneFile(A, B),
        Op::CloneRange((A, 0), (B, 8192), 8192),
        Op::CloneTree(DIR, ROOT, vec![b"copy".to_vec(), b"copy2".to_vec()]),
        Op::Create(DIR, b"new".to_vec(), FileKind::Regular, Vec::new()),
        Op::Link(A, DIR, b"link".to_vec()),
        Op::Unlink(ROOT, b"a".to_vec(), true),
        Op::Unlink(ROOT, b"b".to_vec(), false),
        Op::Rename(
            (ROOT, b"a".to_vec()),
            (ROOT, b"b".to_vec()),
            RenameMode::Replace,
        ),
        Op::Rename(
            (ROOT, b"b".to_vec()),
            (DIR, b"inner".to_vec()),
            RenameMode::Exchange,
        ),
        Op::Checkpoint,
        Op::Sync,
    ]
}

/// Two files with data and a directory with one more.
pub(crate) fn prepare(rng: &mut SplitMix64) -> Vec<Op> {
    let file = |dir, name: &[u8]| Op::Create(dir, name.to_vec(), FileKind::Regular, Vec::new());
    vec![
        file(ROOT, b"a"),
        file(ROOT, b"b"),
        Op::Create(ROOT, b"dir".to_vec(), FileKind::Directory, Vec::new()),
        file(3, b"inner"),
        Op::Write(1, 0, random_bytes(rng, 20000)),
        Op::Write(4, 0, random_bytes(rng, 70000)),
        Op::Checkpoint,
    ]
}
