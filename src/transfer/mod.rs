//! Images of others on their way into the pool: which files belong together, and what of them has
//! to be read.
//!
//! Nothing here writes to a source or prints; nothing here knows the pool but as files.

mod family;
mod fill;
mod library;
mod looks;
mod names;
mod roots;
mod scan;
mod twins;

pub use fill::{Filled, Held, fill, held};
pub use library::{Image, Library, Parent, Through, Trouble, What};
pub use names::destinations;
pub use roots::{FileId, Roots, Spot};
pub use twins::{CloneFile, Twin, Twins};
