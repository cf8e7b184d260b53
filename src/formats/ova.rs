//! OVA: an archive with the disks of a virtual machine and the OVF that describes it.
//!
//! Layout: POSIX tar with the extensions of pax and GNU for long names and large members; DMTF
//! DSP0243 for OVF and its manifest. Nothing is unpacked: a disk is a part of the archive.
//!
//! Invariants:
//!
//! 1. A name in the archive is compared with other names of the archive, and never opened.
//! 2. Every member lies within the file. What the OVF may ask for is bounded by `OVF_MAX`.
//! 3. XML that declares anything is refused: nothing here expands.

use std::collections::HashMap;
use std::sync::Arc;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::source::{Part, check_range, read_vec};
use super::{Source, broken, unsupported};
use crate::error::Result;

const RECORD: u64 = 512;
/// Most members: a virtual machine has a handful.
const MEMBERS_MAX: usize = 4096;
/// Longest OVF, manifest or extended header that is read.
const OVF_MAX: u64 = 4 << 20;
/// Most disks.
const DISKS_MAX: usize = 256;

/// True if a file that begins with `head` is a tar archive, as an OVA is.
pub fn is_archive(head: &[u8]) -> bool {
    head.len() >= 512 && head[257..262] == *b"ustar"
}

/// A regular file in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    name: String,
    start: u64,
    len: u64,
    regular: bool,
}

/// A disk of the virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Name of its file in the archive.
    pub name: String,
    member: usize,
}

/// An open archive.
#[derive(Debug)]
pub struct Ova {
    source: Arc<dyn Source>,
    members: Vec<Member>,
    disks: Vec<Disk>,
    /// Digests of the manifest, by name: algorithm and hexadecimal digits.
    digests: HashMap<String, (String, String)>,
}

impl Ova {
    /// Opens an archive.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        let members = members(&*source)?;
        let find = |ending: &str| {
            let suits = |m: &&Member| m.regular && m.name.to_ascii_lowercase().ends_with(ending);
            members.iter().find(suits)
        };
        let text = |member: &Member| {
            if member.len > OVF_MAX {
                return Err(broken(format!(
                    "a text of the archive is too long: name={:?} bytes={}",
                    member.name, member.len
                )));
            }
            let bytes = read_vec(&*source, member.start, member.len as usize)?;
            String::from_utf8(bytes)
                .map_err(|_| broken(format!("{:?} in the archive is not UTF-8", member.name)))
        };
        let ovf = find(".ovf").ok_or_else(|| broken("the archive has no OVF that names disks"))?;
        let ovf_text = text(ovf)?;
        let disks = disks(&ovf_text, &members)?;
        let digests = match find(".mf") {
            Some(manifest) => digests(&text(manifest)?),
            None => HashMap::new(),
        };
        let ova = Self {
            disks,
            digests,
            members: members.clone(),
            source: source.clone(),
        };
        ova.verify_member(ovf)?;
        Ok(ova)
    }

    /// The disks, in the order of the OVF.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The bytes of a disk's file.
    ///
    /// # Errors
    /// None that [`open`](Self::open) did not find.
    pub fn disk(&self, index: usize) -> Result<Arc<dyn Source>> {
        let member = &self.members[self.disks[index].member];
        let part = Part::new(self.source.clone(), member.start, member.len)?;
        Ok(Arc::new(part))
    }

    /// Compares a disk's file, all of it, with the digest in the manifest, if that has one.
    ///
    /// # Errors
    /// `Corrupt` if they differ; `Io`.
    pub fn verify(&self, index: usize) -> Result<()> {
        self.verify_member(&self.members[self.disks[index].member])
    }

    fn verify_member(&self, member: &Member) -> Result<()> {
        let Some((algorithm, wanted)) = self.digests.get(&member.name) else {
            return Ok(());
        };
        let found = match algorithm.as_str() {
            "SHA1" => self.hash::<Sha1>(member)?,
            "SHA256" => self.hash::<Sha256>(member)?,
            other => {
                return Err(unsupported(format!(
                    "the manifest of the archive has digests that are not known: {other}"
                )));
            }
        };
        if !found.eq_ignore_ascii_case(wanted) {
            return Err(broken(format!(
                "{:?} in the archive is not what its manifest says: damaged on its way?",
                member.name
            )));
        }
        Ok(())
    }

    fn hash<D: Digest>(&self, member: &Member) -> Result<String> {
        const PIECE: u64 = 1 << 20;
        let mut hash = D::new();
        let mut buf = vec![0; member.len.min(PIECE) as usize];
        let mut at = 0;
        while at < member.len {
            let len = (member.len - at).min(PIECE) as usize;
            self.source.read_at(member.start + at, &mut buf[..len])?;
            hash.update(&buf[..len]);
            at += len as u64;
        }
        let bytes = hash.finalize();
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Reads the headers of all members.
fn members(source: &dyn Source) -> Result<Vec<Member>> {
    let (mut at, mut found) = (0, Vec::new());
    // What extended headers say of the next member.
    let (mut long_name, mut long_size) = (None, None);
    while at < source.len() {
        let header = read_vec(source, at, RECORD as usize)
            .map_err(|_| broken("the archive is cut off in a header"))?;
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        check_sum(&header, at)?;
        let kind = header[156];
        let size = match long_size.take() {
            Some(size) if !matches!(kind, b'x' | b'L') => size,
            other => {
                long_size = other;
                number(&header[124..136])?
            }
        };
        let start = at + RECORD;
        check_range(source.len(), start, size).map_err(|_| {
            broken(format!(
                "a member of the archive reaches behind its end: offset={at} bytes={size}"
            ))
        })?;
        at = start + size.next_multiple_of(RECORD);
        match kind {
            b'x' | b'L' if size > OVF_MAX => {
                return Err(broken("an extended header of the archive is too long"));
            }
            b'L' => long_name = Some(text(&read_vec(source, start, size as usize)?)),
            b'x' => {
                for (key, value) in pax(&read_vec(source, start, size as usize)?) {
                    match key.as_str() {
                        "path" => long_name = Some(value),
                        "size" => long_size = value.parse().ok(),
                        _ => {}
                    }
                }
            }
            b'g' | b'K' => {}
            _ => {
                let name = long_name.take().unwrap_or_else(|| ustar_name(&header));
                if name.starts_with('/') || name.split('/').any(|part| part == "..") {
                    return Err(broken(format!(
                        "a member of the archive has a name that leads out of it: {name:?}"
                    )));
                }
                found.push(Member {
                    name: name.strip_prefix("./").unwrap_or(&name).to_owned(),
                    start,
                    len: size,
                    regular: matches!(kind, b'0' | 0 | b'7'),
                });
                if found.len() > MEMBERS_MAX {
                    return Err(broken("the archive has more members than any OVA"));
                }
            }
        }
    }
    Ok(found)
}

fn check_sum(header: &[u8], at: u64) -> Result<()> {
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum::<u64>()
        - header[148..156].iter().map(|b| u64::from(*b)).sum::<u64>()
        + 8 * u64::from(b' ');
    if number(&header[148..156])? != sum {
        return Err(broken(format!(
            "a header of the archive is damaged: offset={at}"
        )));
    }
    Ok(())
}

/// A number in octal digits, or in base 256 where the first bit is set.
fn number(field: &[u8]) -> Result<u64> {
    let bad = || broken("a header of the archive has a number that is none");
    if field[0] & 0x80 != 0 {
        let low = field.len() - 8;
        if field[0] != 0x80 || field[1..low].iter().any(|byte| *byte != 0) {
            return Err(bad());
        }
        return Ok(super::bytes::be64(field, low));
    }
    let digits = text(field);
    let digits = digits.trim();
    if digits.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(digits, 8).map_err(|_| bad())
}

/// Text up to its first NUL.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&field[..end.unwrap_or(field.len())]).into_owned()
}

fn ustar_name(header: &[u8]) -> String {
    let (name, prefix) = (text(&header[..100]), text(&header[345..500]));
    // GNU tar has other things where POSIX has the prefix.
    if prefix.is_empty() || header[262] == b' ' {
        name
    } else {
        format!("{prefix}/{name}")
    }
}

/// Records of an extended header: `LENGTH KEY=VALUE\n`.
fn pax(bytes: &[u8]) -> Vec<(String, String)> {
    let (mut rest, mut found) = (bytes, Vec::new());
    while let Some(space) = rest.iter().position(|byte| *byte == b' ') {
        let len: usize = match text(&rest[..space]).parse() {
            Ok(len) if len > space + 1 && len <= rest.len() => len,
            _ => break,
        };
        let record = String::from_utf8_lossy(&rest[space + 1..len]).into_owned();
        if let Some((key, value)) = record.trim_end_matches('\n').split_once('=') {
            found.push((key.to_owned(), value.to_owned()));
        }
        rest = &rest[len..];
    }
    found
}

/// Lines of a manifest: `SHA256(name)= digits`.
fn digests(manifest: &str) -> HashMap<String, (String, String)> {
    let line = |line: &str| {
        let (algorithm, rest) = line.split_once('(')?;
        let (name, digits) = rest.rsplit_once(')')?;
        let digits = digits.trim().strip_prefix('=')?.trim();
        let algorithm = algorithm.trim().to_ascii_uppercase().replace('-', "");
        Some((name.to_owned(), (algorithm, digits.to_owned())))
    };
    manifest.lines().filter_map(line).collect()
}

/// The disks that the OVF names, each a member.
fn disks(ovf: &str, members: &[Member]) -> Result<Vec<Disk>> {
    let elements = elements(ovf)?;
    let mut files = HashMap::new();
    for element in elements.iter().filter(|element| element.name == "File") {
        if let (Some(id), Some(href)) = (element.get("id"), element.get("href")) {
            files.insert(id, (href, element));
        }
    }
    let mut found = Vec::new();
    for disk in elements.iter().filter(|element| element.name == "Disk") {
        // An empty disk of the machine has no file.
        let Some(reference) = disk.get("fileRef") else {
            continue;
        };
        let Some((href, file)) = files.get(reference) else {
            return Err(broken(format!(
                "the OVF has a disk of a file that it does not list: {reference:?}"
            )));
        };
        if disk.get("parentRef").is_some() {
            return Err(unsupported(
                "a disk of the OVF is a difference from another",
            ));
        }
        if file.get("chunkSize").is_some()
            || file.get("compression").is_some_and(|c| c != "identity")
        {
            return Err(unsupported(format!(
                "a disk of the OVF is in pieces or compressed as a whole: {href:?}"
            )));
        }
        let Some(member) = members.iter().position(|member| member.name == *href) else {
            return Err(broken(format!(
                "the OVF names a disk that is not in the archive: {href:?}"
            )));
        };
        if !members[member].regular {
            return Err(broken(format!(
                "a disk in the archive is no regular file: {href:?}"
            )));
        }
        found.push(Disk {
            name: (*href).to_owned(),
            member,
        });
        if found.len() > DISKS_MAX {
            return Err(broken("the OVF has more disks than any machine"));
        }
    }
    if found.is_empty() {
        return Err(broken("the OVF names no disk with contents"));
    }
    Ok(found)
}

/// The start of an XML element, without prefixes of namespaces.
#[derive(Debug)]
struct Element {
    name: String,
    attributes: Vec<(String, String)>,
}

impl Element {
    fn get(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

fn local(name: &str) -> String {
    name.rsplit(':').next().unwrap_or(name).to_owned()
}

/// All start tags of a document. Text between them is of no use here.
fn elements(xml: &str) -> Result<Vec<Element>> {
    let cut = || broken("the OVF is cut off");
    let (mut rest, mut found) = (xml, Vec::new());
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let skip = |rest: &str, end: &str| rest.find(end).map(|at| at + end.len()).ok_or_else(cut);
        if rest.starts_with("!--") {
            rest = &rest[skip(rest, "-->")?..];
        } else if rest.starts_with('?') {
            rest = &rest[skip(rest, "?>")?..];
        } else if rest.starts_with("![CDATA[") {
            rest = &rest[skip(rest, "]]>")?..];
        } else if rest.starts_with('!') {
            return Err(broken("the OVF declares entities, which no product does")); // I3
        } else if rest.starts_with('/') {
            rest = &rest[skip(rest, ">")?..];
        } else {
            let (element, len) = element(rest)?;
            rest = &rest[len..];
            found.push(element);
        }
    }
    Ok(found)
}

/// One start tag, and its length.
fn element(text: &str) -> Result<(Element, usize)> {
    let bad = || broken("the OVF is no well-formed XML");
    let name_end = text
        .find(|c: char| c.is_whitespace() || c == '>' || c == '/')
        .ok_or_else(bad)?;
    let mut element = Element {
        name: local(&text[..name_end]),
        attributes: Vec::new(),
    };
    let mut rest = &text[name_end..];
    loop {
        rest = rest.trim_start();
        if let Some(end) = rest.strip_prefix("/>").or_else(|| rest.strip_prefix('>')) {
            return Ok((element, text.len() - end.len()));
        }
        let (key, value) = rest.split_once('=').ok_or_else(bad)?;
        let value = value.trim_start();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let quote = quote.ok_or_else(bad)?;
        let (value, end) = value[1..].split_once(quote).ok_or_else(bad)?;
        element
            .attributes
            .push((local(key.trim()), unescape(value)?));
        rest = end;
    }
}

/// Replaces the five references that XML has by itself.
fn unescape(value: &str) -> Result<String> {
    let (mut out, mut rest) = (String::new(), value);
    while let Some((before, after)) = rest.split_once('&') {
        let (name, behind) = after
            .split_once(';')
            .ok_or_else(|| broken("the OVF is no well-formed XML"))?;
        out.push_str(before);
        out.push(match name {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            other => {
                return Err(broken(format!(
                    "the OVF has an unknown reference: {other:?}"
                )));
            }
        });
        rest = behind;
    }
    Ok(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(members: &[(&str, u8, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, data) in members {
            let mut header = [0; 512];
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
            header[148..156].fill(b' ');
            header[156] = *kind;
            header[257..263].copy_from_slice(b"ustar\0");
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    const OVF: &str = r#"<?xml version="1.0"?><!-- a > b --><Envelope xmlns:ovf="x">
        <References><File ovf:id="f1" ovf:href="a &amp; b.vmdk"/></References>
        <DiskSection><Disk ovf:fileRef="f1" ovf:diskId='d'/><Disk ovf:diskId="empty"/>
        </DiskSection></Envelope>"#;
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn open(members: &[(&str, u8, &[u8])]) -> Result<Ova> {
        Ova::open(Arc::new(archive(members)))
    }

    #[test]
    fn disks_are_found_by_the_ovf_and_verified_by_the_manifest() {
        let manifest = format!("SHA256(a & b.vmdk)= {HELLO}\n");
        let good: [(&str, u8, &[u8]); 3] = [
            ("vm.ovf", b'0', OVF.as_bytes()),
            ("vm.mf", b'0', manifest.as_bytes()),
            ("a & b.vmdk", b'0', b"hello"),
        ];
        let ova = open(&good).unwrap();
        assert_eq!(ova.disks().len(), 1);
        let disk = ova.disk(0).unwrap();
        assert_eq!(read_vec(&*disk, 0, 5).unwrap(), b"hello");
        ova.verify(0).unwrap();
        let mut bad = good;
        bad[2].2 = b"hallo";
        assert!(open(&bad).unwrap().verify(0).is_err());
    }

    #[test]
    fn what_leads_out_or_expands_is_refused() {
        let ovf = |text: &'static str| ("vm.ovf", b'0', text.as_bytes());
        let disk: (&str, u8, &[u8]) = ("a & b.vmdk", b'0', b"hello");
        for members in [
            vec![disk],
            vec![ovf(OVF)],
            vec![ovf(OVF), ("a & b.vmdk", b'2', b"")],
            vec![ovf(OVF), disk, ("../x", b'0', b"")],
            vec![ovf("<!DOCTYPE x [<!ENTITY a \"b\">]><Envelope/>"), disk],
            vec![ovf("<File id=\"f\" href=\"&bomb;\"/>"), disk],
            vec![ovf("<Envelope"), disk],
            vec![ovf("<Envelope a=>"), disk],
            vec![ovf("<Envelope a=\u{e9}>"), disk],
        ] {
            assert!(open(&members).is_err(), "{members:?}");
        }
        let mut cut = archive(&[ovf(OVF), disk]);
        cut.truncate(512 + 700);
        assert!(Ova::open(Arc::new(cut)).is_err());
    }
}
