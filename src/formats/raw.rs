//! Raw images: the bytes of the disk.

use std::sync::Arc;

use super::{Content, Facts, Format, Layer, Run, Source};
use crate::error::Result;
use crate::units::SECTOR_SIZE;

/// An open raw image.
#[derive(Debug)]
pub struct Raw {
    facts: Facts,
    sources: [Arc<dyn Source>; 1],
}

impl Raw {
    /// Any file is one.
    pub fn open(source: Arc<dyn Source>) -> Self {
        Self {
            facts: Facts {
                format: Format::Raw,
                subtype: "raw",
                size: source.len(),
                block: 0,
                sector: SECTOR_SIZE as u32,
                identity: None,
                version: None,
                creator: String::new(),
                parent: None,
                notes: Vec::new(),
            },
            sources: [source],
        }
    }
}

impl Layer for Raw {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        Ok(Run {
            len: most.min(self.facts.size - offset),
            content: Content::Data {
                source: 0,
                at: offset,
            },
        })
    }
}
