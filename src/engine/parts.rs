//! Parts of the engine that the model checker looks at alone, because a whole pool has too many
//! steps between the two that matter. Only with the feature `shuttle`.

use std::sync::Arc;

use super::cache::{Pin, Readers};

/// The pins that keep a block from being used again while somebody reads it.
#[derive(Debug, Default)]
pub struct Reading(Arc<Readers>);

/// Somebody who reads.
#[derive(Debug)]
pub struct Reader {
    _pin: Pin,
}

impl Reading {
    /// Begins to read.
    pub fn begin(&self) -> Reader {
        Reader { _pin: self.0.pin() }
    }

    /// Waits for all who began before. One caller at a time.
    pub fn wait(&self) {
        self.0.wait();
    }
}
