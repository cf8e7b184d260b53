//! Log messages on standard error: warnings of a verb, and the life of a daemon.
//!
//! `RUST_LOG` decides; without it verbs show warnings and the daemon also its events. While
//! somebody waits for a mount only warnings are shown, because they appear on that terminal.

use std::env;
use std::io::Write;
use std::sync::OnceLock;

use env_logger::{Builder, Env};
use log::LevelFilter;

/// What the logger's own filter lets through at most.
static FILTER: OnceLock<LevelFilter> = OnceLock::new();

/// Sets up the log. `service`: this process serves a mount; `background`: and somebody waits
/// for it.
pub(super) fn init(service: bool, background: bool) {
    let mut builder =
        Builder::from_env(Env::default().default_filter_or(if service { "info" } else { "warn" }));
    if !service {
        builder.format(|out, record| writeln!(out, "nodupe: {}", record.args()));
    }
    let logger = builder.build();
    let filter = logger.filter();
    if log::set_boxed_logger(Box::new(logger)).is_err() {
        return; // set up already
    }
    let quiet = background && env::var_os("RUST_LOG").is_none();
    log::set_max_level(if quiet { LevelFilter::Warn } else { filter });
    FILTER.set(filter).ok();
}

#[cfg(feature = "fuse")]
/// Nobody waits any more: shows all that the filter lets through.
pub(super) fn show_all() {
    if let Some(&filter) = FILTER.get() {
        log::set_max_level(filter);
    }
}
