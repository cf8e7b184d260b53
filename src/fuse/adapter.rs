//! What requests are answered with: the state behind the session, and each kind of reply.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{
    Errno, Generation, INodeNo, Notifier, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyWrite, ReplyXattr,
};

use super::control::Server;
use super::convert::{file_attr, ino};
use super::errno::ErrorLog;
use super::worker::Queue;
use crate::control;
use crate::engine::Attr;
use crate::error::Result;
use crate::units::Ino;
use crate::vfs::{Caller, HandleId, StalePages, Vfs, Watcher};

/// How long the kernel trusts names and attributes. Nobody but the kernel changes them, except
/// clones by the control channel; short, so that permissions of a directory are never long stale.
pub(super) const TTL: Duration = Duration::from_secs(1);

/// Tells the kernel what changed behind its back.
#[derive(Clone, Debug, Default)]
pub(super) struct Invalidator {
    notifier: Arc<OnceLock<Notifier>>,
}

impl Invalidator {
    /// From now on, over this session.
    pub(super) fn connect(&self, notifier: Notifier) {
        // Connected once, by `mount`: a second one would be the same session.
        drop(self.notifier.set(notifier));
    }

    /// The directory has new entries. Names that were missing are never cached, so its times are
    /// all that is stale. Takes no lock in the kernel that a request could hold.
    fn directory(&self, dir: Ino) {
        self.tell(dir, -1, 0);
    }

    /// Pages of a file are stale. Waits until readers have filled theirs, so it is not for a
    /// session thread: all of them could be waiting while nobody answers the readers.
    fn pages(&self, ino: Ino, offset: u64, len: u32) {
        match i64::try_from(offset) {
            Ok(offset) => self.tell(ino, offset, len.into()),
            Err(_) => self.tell(ino, 0, 0),
        }
    }

    /// A negative offset: only attributes.
    fn tell(&self, ino: Ino, offset: i64, len: i64) {
        if let Some(notifier) = self.notifier.get()
            && let Err(error) = notifier.inval_inode(INodeNo(ino.0), offset, len)
        {
            log::debug!("the kernel was not told of a change: inode={ino}: {error}");
        }
    }
}

impl Watcher for Invalidator {
    /// The kernel asks for a mode only when it knows that it is stale.
    fn mode_changed(&self, ino: Ino) {
        self.tell(ino, -1, 0);
    }
}

/// A [`Vfs`] as fuser sees it.
#[derive(Debug)]
pub(super) struct Adapter {
    pub(super) vfs: Arc<Vfs>,
    control: Arc<Server>,
    worker: Queue,
    /// What waits for the page cache.
    pages: Queue,
    invalidator: Invalidator,
    pub(super) errors: Arc<ErrorLog>,
}

impl Adapter {
    pub(super) fn new(vfs: Arc<Vfs>, control: Server, worker: Queue, pages: Queue) -> Self {
        let errors = ErrorLog::new(vfs.pool().clone());
        Self {
            vfs,
            control: Arc::new(control),
            worker,
            pages,
            invalidator: Invalidator::default(),
            errors: Arc::new(errors),
        }
    }

    pub(super) fn invalidator(&self) -> Invalidator {
        self.invalidator.clone()
    }

    pub(super) fn attr(&self, attr: &Attr) -> fuser::FileAttr {
        file_attr(attr, self.vfs.blocks(attr))
    }

    pub(super) fn reply_entry(
        &self,
        operation: &str,
        parent: INodeNo,
        result: Result<Attr>,
        reply: ReplyEntry,
    ) {
        match result {
            Ok(attr) => reply.entry(&TTL, &self.attr(&attr), Generation(attr.generation)),
            Err(error) => reply.error(self.errors.errno(operation, parent.0, &error)),
        }
    }

    pub(super) fn reply_attr(
        &self,
        operation: &str,
        inode: INodeNo,
        result: Result<Attr>,
        reply: ReplyAttr,
    ) {
        match result {
            Ok(attr) => reply.attr(&TTL, &self.attr(&attr)),
            Err(error) => reply.error(self.errors.errno(operation, inode.0, &error)),
        }
    }

    pub(super) fn reply_empty(
        &self,
        operation: &str,
        inode: INodeNo,
        result: Result<()>,
        reply: ReplyEmpty,
    ) {
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.errors.errno(operation, inode.0, &error)),
        }
    }

    pub(super) fn reply_xattr(
        &self,
        inode: INodeNo,
        size: u32,
        value: Result<Vec<u8>>,
        reply: ReplyXattr,
    ) {
        let value = match value {
            Ok(value) => value,
            Err(error) => return reply.error(self.errors.errno("getxattr", inode.0, &error)),
        };
        match u32::try_from(value.len()) {
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if len <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        }
    }

    /// Answers once everything acknowledged so far is durable; the session thread goes on.
    pub(super) fn reply_synced(
        &self,
        operation: &'static str,
        inode: INodeNo,
        reply: impl FnOnce(std::result::Result<(), Errno>) + Send + 'static,
    ) {
        let errors = self.errors.clone();
        self.vfs.sync_with(Box::new(move |result| {
            reply(result.map_err(|error| errors.errno(operation, inode.0, &error)));
        }));
    }

    /// fsync of anything; of the root directory: a checkpoint, with everything at its place.
    pub(super) fn sync(&self, operation: &'static str, inode: INodeNo, reply: ReplyEmpty) {
        if ino(inode) == Ino::ROOT {
            let vfs = self.vfs.clone();
            let errors = self.errors.clone();
            return self.worker.run(move || match vfs.checkpoint() {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errors.errno(operation, inode.0, &error)),
            });
        }
        self.reply_synced(operation, inode, |result| match result {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        });
    }

    /// Answers a write of `bytes` around the page cache, once that has dropped what is stale.
    pub(super) fn reply_written_directly(
        &self,
        inode: INodeNo,
        (handle, offset, bytes): (HandleId, u64, u32),
        sync: bool,
        reply: ReplyWrite,
    ) {
        let (offset, len) = match self.vfs.stale_pages(handle, ino(inode)) {
            StalePages::None => return self.reply_written("write", inode, bytes, sync, reply),
            StalePages::Written => (offset, bytes),
            StalePages::All => (0, 0), // length 0: to the end
        };
        let (vfs, invalidator, errors) = (
            self.vfs.clone(),
            self.invalidator.clone(),
            self.errors.clone(),
        );
        self.pages.run(move || {
            invalidator.pages(ino(inode), offset, len);
            if !sync {
                return reply.written(bytes);
            }
            vfs.sync_with(Box::new(move |result| match result {
                Ok(()) => reply.written(bytes),
                Err(error) => reply.error(errors.errno("write", inode.0, &error)),
            }));
        });
    }

    /// Answers a write or copy of `bytes`, durable first if `sync`.
    pub(super) fn reply_written(
        &self,
        operation: &'static str,
        inode: INodeNo,
        bytes: u32,
        sync: bool,
        reply: ReplyWrite,
    ) {
        if !sync {
            reply.written(bytes);
            return self.vfs.anticipate_sync();
        }
        self.reply_synced(operation, inode, move |result| match result {
            Ok(()) => reply.written(bytes),
            Err(errno) => reply.error(errno),
        });
    }

    pub(super) fn answer_control(
        &self,
        caller: Caller,
        handle: HandleId,
        inode: Ino,
        payload: &[u8],
        reply: ReplyIoctl,
    ) {
        let request = match control::Request::decode(payload) {
            Ok(request) => request,
            Err(error) => return reply_control(reply, &Err(error)),
        };
        if request == control::Request::Checkpoint {
            let server = self.control.clone();
            return self.worker.run(move || {
                reply_control(reply, &server.answer(&caller, handle, inode, &request));
            });
        }
        let result = self.control.answer(&caller, handle, inode, &request);
        if matches!(result, Ok(control::Response::Clones(_))) {
            self.invalidator.directory(inode);
        }
        if matches!(request, control::Request::Share { .. })
            && self.vfs.stale_pages(handle, inode) != StalePages::None
        {
            let invalidator = self.invalidator.clone();
            return self.pages.run(move || {
                invalidator.pages(inode, 0, 0); // length 0: to the end
                reply_control(reply, &result);
            });
        }
        reply_control(reply, &result);
    }
}

fn reply_control(reply: ReplyIoctl, result: &Result<control::Response>) {
    reply.ioctl(0, &control::Response::encode(result)[..]);
}
