//! What is agreed with the kernel when the mount begins: sizes, queues, capabilities.

use std::io;

use fuser::{InitFlags, KernelConfig};

/// Largest write, in bytes: 256 pages, the most that the kernel allows by default.
const WRITE_BYTES_MAX: u32 = 1024 * 1024;

/// Requests in the background (read-ahead, asynchronous direct I/O) that may be under way: eight
/// guests with 32 each.
const BACKGROUND_MAX: u16 = 256;

/// At which the kernel begins to hold readers back: three quarters.
const CONGESTION_THRESHOLD: u16 = BACKGROUND_MAX / 4 * 3;

/// What is asked of the kernel, where it offers it. Not FUSE_WRITEBACK_CACHE: sizes and times
/// would be the kernel's, and a copy would have to wait for them.
const CAPABILITIES: [InitFlags; 9] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_HAS_IOCTL_DIR,
    // We drop set-id bits and capabilities; without this each write asks for them first.
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
];

/// Agrees.
pub(super) fn configure(config: &mut KernelConfig) -> io::Result<()> {
    for capability in CAPABILITIES {
        if config.add_capabilities(capability).is_err() {
            log::debug!("the kernel does not offer {capability:?}");
        }
    }
    // Each setter refuses what cannot be, and names the nearest value that can.
    let set = config
        .set_max_readahead(WRITE_BYTES_MAX)
        .or_else(|nearest| config.set_max_readahead(nearest));
    if set.is_err() {
        log::debug!("the kernel does not read ahead");
    }
    config
        .set_max_write(WRITE_BYTES_MAX)
        .map_err(|most| io::Error::other(format!("writes have at most {most} bytes")))?;
    config
        .set_max_background(BACKGROUND_MAX)
        .and_then(|_| config.set_congestion_threshold(CONGESTION_THRESHOLD))
        .map_err(|least| io::Error::other(format!("at least {least} requests wait")))?;
    Ok(())
}
