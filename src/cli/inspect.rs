//! `nodupe inspect`: what disk images are, without importing them.

use std::path::{Path, PathBuf};

use clap::Args;
use nodupe::formats::{Format, Identity};
use nodupe::transfer::{self, Held, Library, Parent, What};
use serde_json::{Value, json};

use super::failure::{Failure, Result};
use super::import::parse_format;
use super::output::{Output, clean, list, show};
use super::size::human;

const EXAMPLE: &str = "\
Examples:
  nodupe inspect disk.vhdx
  nodupe inspect --json /srv/vms/*.vmdk";

/// Tells what disk images are: format, size, what is allocated, ids, parents, and whether they can
/// be read.
///
/// The files may be anywhere, in a mounted pool or not. Nothing is changed.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Inspect {
    /// Images
    #[arg(required = true)]
    file: Vec<PathBuf>,
    /// What they are, without looking at their contents
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    from: Option<Format>,
    /// Directory in which parents and extents may be, too
    #[arg(long, value_name = "DIR")]
    allow_parent: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Inspect, output: Output) -> Result<()> {
    let (mut shown, mut failures) = (Vec::new(), Vec::new());
    for file in &args.file {
        match look(args, file) {
            Ok(library) => {
                let wanted = (0..)
                    .zip(library.images())
                    .filter(|(_, image)| image.wanted);
                shown.extend(wanted.map(|(index, _)| Found::new(&library, index)));
            }
            Err(error) => {
                failures.push(Failure::new(format!("cannot read {}", show(file))).because(&error))
            }
        }
    }
    if args.json {
        let images: Vec<Value> = shown.iter().map(Found::json).collect();
        output.json(json!({ "images": images }));
    } else if !shown.is_empty() {
        let texts: Vec<String> = shown.iter().map(Found::text).collect();
        output.data(&texts.join("\n"));
    }
    if failures.is_empty() && shown.iter().any(|found| found.trouble.is_some()) {
        return Err(Failure::silent(super::FAILED));
    }
    let last = failures.pop();
    failures.iter().for_each(super::output::failure);
    last.map_or(Ok(()), Err)
}

fn look(args: &Inspect, file: &Path) -> nodupe::error::Result<Library> {
    let mut library = Library::new();
    for dir in &args.allow_parent {
        library.allow(dir)?;
    }
    library.add_file(file, args.from)?;
    library.resolve();
    Ok(library)
}

/// What is known of one disk.
struct Found {
    path: PathBuf,
    image: transfer::Image,
    held: Option<Held>,
    /// Files from the parent to the oldest, and how each was found.
    parents: Vec<(PathBuf, &'static str)>,
    /// Why it cannot be read.
    trouble: Option<String>,
}

impl Found {
    fn new(library: &Library, index: usize) -> Self {
        let mut found = Self {
            path: library.path(index),
            image: library.images()[index].clone(),
            held: None,
            parents: Vec::new(),
            trouble: None,
        };
        let mut at = index;
        while let Parent::Image(parent, how) = library.images()[at].parent
            && found.parents.len() < library.images().len()
        {
            found.parents.push((library.path(parent), how));
            at = parent;
        }
        let read = library.chain(index).and_then(|_| library.layer(index));
        match read.and_then(|layer| transfer::held(&*layer)) {
            Ok(held) => found.held = Some(held),
            Err(error) => {
                let failure = Failure::new("").because(&error);
                found.trouble = Some(failure.chain[1..].join(": "));
            }
        }
        found
    }

    fn identity(&self) -> Option<String> {
        Some(match self.image.facts.identity? {
            Identity::Uuid(uuid) => uuid.to_string(),
            Identity::Cid(cid) => format!("{cid:08x}"),
        })
    }

    fn name(&self) -> Option<String> {
        match &self.image.what {
            What::Disk => None,
            What::Snapshot(_, name) => Some(format!("snapshot {}", clean(name))),
            What::Member(_, name) => Some(format!("disk {} in an OVA", clean(name))),
        }
    }

    /// Names that the image has for its parent.
    fn names(&self) -> Vec<String> {
        let parent = self.image.facts.parent.as_ref();
        let names = parent.map(|parent| parent.names.as_slice());
        names
            .unwrap_or_default()
            .iter()
            .map(|name| clean(name))
            .collect()
    }

    fn text(&self) -> String {
        let facts = &self.image.facts;
        let mut lines = vec![("file", show(&self.path))];
        if let Some(name) = self.name() {
            lines.push(("disk", name));
        }
        lines.push(("format", format!("{}, {}", facts.format, facts.subtype)));
        lines.push((
            "size",
            format!("{} ({} bytes)", human(facts.size), facts.size),
        ));
        if let Some(held) = self.held {
            lines.push(("allocated", human(held.data)));
        }
        lines.push(("stored", human(self.image.stored)));
        if facts.block > 0 {
            lines.push(("block size", human(facts.block)));
        }
        lines.push(("sector size", facts.sector.to_string()));
        if let Some(identity) = self.identity() {
            lines.push(("identity", identity));
        }
        if !facts.creator.is_empty() {
            lines.push(("creator", clean(&facts.creator)));
        }
        for (path, how) in &self.parents {
            lines.push(("parent", format!("{}, found {how}", show(path))));
        }
        if facts.parent.is_some() && self.parents.is_empty() {
            lines.push(("parent", self.names().join(", ")));
        }
        for note in &facts.notes {
            lines.push(("note", clean(note)));
        }
        let health = self.trouble.clone();
        lines.push(("health", health.unwrap_or_else(|| "ok".to_owned())));
        list(&lines)
    }

    fn json(&self) -> Value {
        let facts = &self.image.facts;
        let parents: Vec<Value> = self
            .parents
            .iter()
            .map(|(path, how)| json!({"file": show(path), "found": how}))
            .collect();
        let notes: Vec<String> = facts.notes.iter().map(|note| clean(note)).collect();
        json!({
            "file": show(&self.path),
            "disk": self.name(),
            "format": facts.format.name(),
            "subtype": facts.subtype,
            "size": facts.size,
            "allocated": self.held.map(|held| held.data),
            "stored": self.image.stored,
            "block": facts.block,
            "sector": facts.sector,
            "identity": self.identity(),
            "creator": clean(&facts.creator),
            "differencing": facts.parent.is_some(),
            "parent_names": self.names(),
            "parents": parents,
            "notes": notes,
            "health": match &self.trouble {
                Some(why) => why.as_str(),
                None => "ok",
            },
        })
    }
}
