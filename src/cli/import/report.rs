//! What an import tells: the family tree, and what is shared.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use nodupe::engine::FileUsage;
use nodupe::transfer::{Library, Parent, What};
use serde_json::{Value, json};

use super::super::client;
use super::super::failure::{Failure, Result};
use super::super::output::{Align, Output, Table, clean, show};
use super::super::size::human;
use super::make::Made;

/// An import that has ended.
pub(super) struct Report<'a> {
    pub(super) library: &'a Library,
    pub(super) made: &'a Made,
    pub(super) seconds: f64,
}

impl Report<'_> {
    pub(super) fn print(&self, json: bool, failures: &[Failure], output: Output) -> Result<()> {
        let mut usage = HashMap::new();
        for (index, path) in &self.made.files {
            usage.insert(*index, client::file_usage(path)?);
        }
        if json {
            output.json(self.json(&usage, failures));
        } else if !usage.is_empty() {
            if !output.quiet {
                output.data(&self.tree(&usage));
            }
            let shared: u64 = usage.values().map(shared).sum();
            let read = self.made.filled.read;
            let rate = (read as f64 / self.seconds.max(0.001)) as u64;
            output.done(&format!(
                "{} imported in {:.1} s: {} read at {}/s, {} written, {} shared",
                match usage.len() {
                    1 => "1 image".to_owned(),
                    count => format!("{count} images"),
                },
                self.seconds,
                human(read),
                human(rate),
                human(self.made.filled.written),
                human(shared),
            ));
        }
        Ok(())
    }

    /// The image above one that was imported as well.
    fn parent(&self, index: usize) -> Option<usize> {
        let images = self.library.images();
        if let What::Snapshot(..) = images[index].what {
            let disk = |i: &usize| images[*i].what == What::Disk;
            return (0..index)
                .rev()
                .filter(disk)
                .find(|i| images[*i].spot == images[index].spot && self.is_made(*i));
        }
        let mut at = index;
        loop {
            match images[at].parent {
                Parent::Image(parent, _) if self.is_made(parent) => return Some(parent),
                Parent::Image(parent, _) => at = parent,
                Parent::None | Parent::Missing(_) => return None,
            }
        }
    }

    fn is_made(&self, index: usize) -> bool {
        self.made.files.contains_key(&index)
    }

    /// A table in which children stand indented below their parents.
    fn tree(&self, usage: &HashMap<usize, FileUsage>) -> String {
        let mut files: Vec<(&PathBuf, usize)> = self
            .made
            .files
            .iter()
            .map(|(index, path)| (path, *index))
            .collect();
        files.sort();
        let mut below: HashMap<Option<usize>, Vec<usize>> = HashMap::new();
        for (_, index) in &files {
            below.entry(self.parent(*index)).or_default().push(*index);
        }
        let right = |name| (name, Align::Right);
        let mut table = Table::new(&[
            ("FILE", Align::Left),
            right("SIZE"),
            right("DATA"),
            right("SHARED"),
            ("FROM", Align::Left),
        ]);
        let mut pending: Vec<(usize, usize)> = Vec::new();
        let push = |pending: &mut Vec<_>, parent, depth| {
            let children: &[usize] = below.get(&parent).map_or(&[], Vec::as_slice);
            pending.extend(children.iter().rev().map(|child| (*child, depth)));
        };
        push(&mut pending, None, 0);
        let mut seen = HashSet::new();
        while let Some((index, depth)) = pending.pop() {
            if !seen.insert(index) {
                continue;
            }
            let (image, used) = (&self.library.images()[index], &usage[&index]);
            table.row(vec![
                format!("{}{}", "  ".repeat(depth), show(&self.made.files[&index])),
                human(used.size),
                human(used.mapped),
                human(shared(used)),
                format!("{} {}", image.facts.format, image.facts.subtype),
            ]);
            push(&mut pending, Some(index), depth + 1);
        }
        table.render()
    }

    fn json(&self, usage: &HashMap<usize, FileUsage>, failures: &[Failure]) -> Value {
        let mut images: Vec<(&PathBuf, Value)> = Vec::new();
        for (index, path) in &self.made.files {
            let (image, used) = (&self.library.images()[*index], &usage[index]);
            let parent = self
                .parent(*index)
                .map(|parent| show(&self.made.files[&parent]));
            let held = self.made.held.get(index).copied().unwrap_or_default();
            let (what, name) = match &image.what {
                What::Disk => ("disk", None),
                What::Snapshot(_, name) => ("snapshot", Some(clean(name))),
                What::Member(_, name) => ("member", Some(clean(name))),
            };
            images.push((
                path,
                json!({
                    "source": show(&self.library.path(*index)),
                    "what": what,
                    "name": name,
                    "format": image.facts.format.name(),
                    "subtype": image.facts.subtype,
                    "file": show(path),
                    "size": image.facts.size,
                    "held": held.data,
                    "mapped": used.mapped,
                    "shared": shared(used),
                    "parent": parent,
                }),
            ));
        }
        images.sort_by(|a, b| a.0.cmp(b.0));
        let images: Vec<Value> = images.into_iter().map(|(_, image)| image).collect();
        json!({
            "images": images,
            "failures": failures.iter().map(|f| f.chain.join(": ")).collect::<Vec<_>>(),
            "read": self.made.filled.read,
            "written": self.made.filled.written,
            "deduplicated": self.made.filled.shared,
            "seconds": self.seconds,
        })
    }
}

fn shared(usage: &FileUsage) -> u64 {
    usage.mapped.saturating_sub(usage.exclusive)
}
