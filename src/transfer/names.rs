//! Where images go below the destination.
//!
//! Invariants:
//!
//! 1. No two images get one name; which names they get does not depend on their order.
//! 2. A name is made of the path below what the user named; what an image says of itself adds to
//!    its last part only, without slashes.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::library::{Image, Library, What};

/// Longest name of a file, in bytes.
const NAME_MAX: usize = 255;

/// Paths below the destination for all images that are wanted, by their index. `extension` gives
/// that of an image.
pub fn destinations(
    library: &Library,
    extension: &dyn Fn(&Image) -> &'static str,
) -> HashMap<usize, PathBuf> {
    let wanted = || {
        (0..)
            .zip(library.images())
            .filter(|(_, image)| image.wanted)
    };
    let mut members: HashMap<&Path, usize> = HashMap::new();
    for (_, image) in wanted() {
        if let What::Member(..) = image.what {
            *members.entry(&image.place).or_default() += 1;
        }
    }
    let alone = |image: &Image| members.get(image.place.as_path()) == Some(&1);
    // The short name first; whoever has to share it gets a longer one.
    let makers: [&dyn Fn(&Image) -> String; 2] =
        [&|image| short(image, alone(image)), &|image| long(image)];
    let mut names: HashMap<usize, PathBuf> = HashMap::new();
    let mut taken: HashSet<PathBuf> = HashSet::new();
    let mut pending: Vec<(usize, &Image)> = wanted().collect();
    for make in makers {
        let mut takers: HashMap<PathBuf, Vec<(usize, &Image)>> = HashMap::new();
        for (index, image) in pending {
            let name = fit(&make(image), extension(image));
            takers
                .entry(image.place.with_file_name(name))
                .or_default()
                .push((index, image));
        }
        pending = Vec::new();
        for (path, mut images) in takers {
            if images.len() == 1 && taken.insert(path.clone()) {
                names.extend(images.pop().map(|(index, _)| (index, path)));
            } else {
                pending.append(&mut images);
            }
        }
    }
    // Only an image that imitates another's name is left.
    pending.sort_by_key(|(index, _)| *index);
    for (index, image) in pending {
        for number in 2_u32.. {
            let name = fit(&format!("{}-{number}", long(image)), extension(image));
            let path = image.place.with_file_name(name);
            if taken.insert(path.clone()) {
                names.insert(index, path);
                break;
            }
        }
    }
    names
}

fn short(image: &Image, alone: bool) -> String {
    let stem = super::family::stem(&image.place);
    match &image.what {
        What::Disk => stem,
        What::Member(..) if alone => stem,
        What::Member(_, name) => format!("{stem}-{}", plain(&super::family::stem(Path::new(name)))),
        What::Snapshot(_, name) => format!("{stem}@{}", plain(name)),
    }
}

fn long(image: &Image) -> String {
    let name = image.place.file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    match &image.what {
        What::Disk => name.into_owned(),
        What::Member(number, disk) => format!("{name}-{}-{}", number + 1, plain(disk)),
        What::Snapshot(number, snapshot) => format!("{name}@{}-{}", number + 1, plain(snapshot)),
    }
}

/// Text from an image as part of a name.
fn plain(text: &str) -> String {
    let plain = |c: char| if c == '/' || c.is_control() { '_' } else { c };
    text.chars().map(plain).collect()
}

/// A name with its extension, as long as a name can be.
fn fit(name: &str, extension: &str) -> String {
    let mut end = name.len().min(NAME_MAX - extension.len() - 1);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}.{extension}", &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_within_their_length() {
        let long = "\u{e9}".repeat(200);
        let name = fit(&long, "qcow2");
        assert!(name.len() <= NAME_MAX && name.ends_with(".qcow2"));
        assert_eq!(fit("a.b", "raw"), "a.b.raw");
        assert_eq!(plain("a/b\n"), "a_b_");
    }
}
