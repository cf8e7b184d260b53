//! A disk and its parents, read as one: what a layer does not hold is its parent's, and behind the
//! last parent zeros.
//!
//! Invariants:
//!
//! 1. A parent shorter than its child ends in zeros.
//! 2. No recursion: a chain is a list, walked from the disk to its oldest parent.

use std::sync::Arc;

use super::{Content, Facts, Layer, Run, Source};
use crate::error::Result;

/// Layers from the disk itself to its oldest parent.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Box<dyn Layer>>,
}

impl Chain {
    /// A disk with its parents, nearest first; at least the disk.
    pub fn new(layers: Vec<Box<dyn Layer>>) -> Self {
        assert!(!layers.is_empty(), "a chain has at least the disk itself");
        Self { layers }
    }

    /// The layers, the disk first.
    pub fn layers(&self) -> &[Box<dyn Layer>] {
        &self.layers
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.layers[0].facts().size
    }

    /// What stands at `offset`, below the size, for at most `most` bytes, and in which layer. Never
    /// `Absent`: that is `Zero` behind the last parent.
    ///
    /// # Errors
    /// As [`Layer::run`].
    pub fn run(&self, offset: u64, most: u64) -> Result<(usize, Run)> {
        let mut most = most.min(self.size() - offset);
        for (i, layer) in self.layers.iter().enumerate() {
            let size = layer.facts().size;
            if offset >= size {
                break; // I1
            }
            let run = layer.run(offset, most)?;
            if run.content != Content::Absent {
                return Ok((i, run));
            }
            most = run.len;
        }
        Ok((
            0,
            Run {
                len: most,
                content: Content::Zero,
            },
        ))
    }

    /// Fills `buf` from `offset`; the range lies within the disk.
    ///
    /// # Errors
    /// As [`Layer::read`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let rest = &mut buf[done..];
            let (layer, run) = self.run(at, rest.len() as u64)?;
            let part = &mut rest[..run.len as usize];
            match run.content {
                Content::Zero | Content::Absent => part.fill(0),
                Content::Data { .. } | Content::Packed => self.layers[layer].read(at, part)?,
            }
            done += run.len as usize;
        }
        Ok(())
    }
}

/// A chain as one layer, in which nothing is absent.
#[derive(Debug)]
pub struct Whole {
    chain: Chain,
    sources: Vec<Arc<dyn Source>>,
    /// Index of the first source of each layer.
    first: Vec<usize>,
}

impl Whole {
    /// All of `chain`.
    pub fn new(chain: Chain) -> Self {
        let (mut sources, mut first) = (Vec::new(), Vec::new());
        for layer in chain.layers() {
            first.push(sources.len());
            sources.extend_from_slice(layer.sources());
        }
        Self {
            chain,
            sources,
            first,
        }
    }
}

impl Layer for Whole {
    fn facts(&self) -> &Facts {
        self.chain.layers[0].facts()
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let (layer, mut run) = self.chain.run(offset, most)?;
        if let Content::Data { source, .. } = &mut run.content {
            *source += self.first[layer];
        }
        Ok(run)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read(offset, buf)
    }
}
