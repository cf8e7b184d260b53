//! Plans of VDI: fixed, dynamic, differencing. Little-endian.
//!
//! Header, block map at 4 KiB, blocks without gaps from the next MiB on. A block of a differencing
//! image is whole: what of it does not differ stands there as well.

use super::{
    MIB, Map, Part, Plan, PlannedFile, SECTOR, Shape, Spec, all_blocks, blocks, contiguous, count,
    put, too_large,
};
use crate::error::Result;
use crate::formats::vdi::MAGIC;
use crate::formats::{Identity, unsupported};

const BLOCK: u64 = MIB;
const TABLE: u64 = 4096;
/// Entries that the format counts in 32 bits, two of which have a meaning; QEMU stops before.
const BLOCKS_MAX: u64 = 0x1fff_ff80;
const VERSION: u32 = 0x0001_0001;
const HEADER_LEN: u32 = 400;
const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
const DIFFERENCING: u32 = 4;

pub(super) fn plan(spec: &Spec, map: &dyn Map) -> Result<Plan> {
    let size = spec.size.next_multiple_of(SECTOR);
    let entries = size.div_ceil(BLOCK);
    if entries > BLOCKS_MAX {
        return Err(too_large(spec, "512 TiB"));
    }
    let (kind, runs) = match spec.shape {
        Shape::VdiFixed => (STATIC, all_blocks(BLOCK, spec.size)),
        _ if spec.parent.is_some() => (DIFFERENCING, blocks(map, BLOCK, spec.size)?),
        _ => (DYNAMIC, blocks(map, BLOCK, spec.size)?),
    };
    let data = (TABLE + entries * 4).next_multiple_of(MIB);
    let data_offset = u32::try_from(data).map_err(|_| too_large(spec, "1 PiB"))?;
    let mut table = vec![0xff; entries as usize * 4];
    for run in &runs {
        for i in 0..run.count {
            let place = (run.before + i) as u32;
            put(
                &mut table,
                (run.first + i) as usize * 4,
                &place.to_le_bytes(),
            );
        }
    }
    let mut header = vec![0; SECTOR as usize];
    put(&mut header, 0, b"<<< Oracle VM VirtualBox Disk Image >>>\n");
    let mut number = |at: usize, value: u32| put(&mut header, at, &value.to_le_bytes());
    number(64, MAGIC);
    number(68, VERSION);
    number(72, HEADER_LEN);
    number(76, kind);
    number(340, TABLE as u32);
    number(344, data_offset);
    number(360, SECTOR as u32);
    number(376, BLOCK as u32);
    number(384, entries as u32);
    number(388, count(&runs) as u32);
    number(468, SECTOR as u32);
    put(&mut header, 368, &size.to_le_bytes());
    put(&mut header, 392, &spec.ids.uuid.to_guid());
    put(&mut header, 408, &spec.ids.others[0].to_guid());
    if let Some(parent) = &spec.parent {
        let Some(Identity::Uuid(uuid)) = parent.identity else {
            return Err(unsupported(
                "a differencing VDI needs a VDI as its parent, which has an id",
            ));
        };
        // Its id is all that names it: the format has no place for a file name.
        put(&mut header, 424, &uuid.to_guid());
        let version = parent.version.unwrap_or_default();
        put(&mut header, 440, &version.to_guid());
    }
    let mut parts = vec![
        Part::Bytes {
            at: 0,
            bytes: header,
        },
        Part::Bytes {
            at: TABLE,
            bytes: table,
        },
    ];
    let len = data + count(&runs) * BLOCK;
    parts.extend(contiguous(&runs, data, BLOCK));
    let file = PlannedFile {
        name: None,
        len,
        parts,
    };
    Ok(Plan::single(file, spec.size, BLOCK))
}
