//! Journal batches of any records, with right checksums.

use nodupe::device::SimDevice;
use nodupe::ondisk::crc32c;
use nodupe::ondisk::extent::Extent;
use nodupe::ondisk::journal::{BATCH_RECORDS, BatchHeader};
use nodupe::ondisk::record::Record;
use nodupe::units::{Ino, Time};

use super::choose::Choose;
use super::forge::{B, put, superblock};

/// Contents of the data blocks of a batch.
const DATA: [u8; 4096] = [0xda; 4096];

/// Names that mean something in the pools of `template`, and names that must never get in.
const NAMES: [&[u8]; 20] = [
    b"image", b"large", b"link", b"dir", b"moved", b"linked", b"gone", b"a", b"b", b"part",
    b"fifo", b"new", b"new too", b"clone 2", b"clone 7", b".", b"..", b"a/b", b"n\0l", b"pieces",
];

/// Writes batches behind the place from which a closed pool would replay; the ring must be empty.
pub struct Ring<'a> {
    device: &'a SimDevice,
    pool: u64,
    key: [u8; 16],
    start: u64,
    blocks: u64,
    seq: u64,
    pos: u64,
    used: u64,
}

impl<'a> Ring<'a> {
    /// The ring of the pool on `device`.
    pub fn new(device: &'a SimDevice) -> Self {
        let (_, sb) = superblock(device);
        Self {
            device,
            pool: sb.pool_id(),
            key: sb.hash_key,
            start: sb.journal_start,
            blocks: sb.journal_blocks,
            seq: sb.journal_seq,
            pos: sb.journal_pos,
            used: 0,
        }
    }

    /// Appends a batch of records; false if it does not fit. Data blocks come with it and get
    /// right checksums.
    pub fn append(&mut self, records: &mut [Record]) -> bool {
        let mut bytes = vec![0; BATCH_RECORDS];
        let mut data_blocks = 0;
        for record in records.iter_mut() {
            if let Record::Block { crc, .. } = record {
                *crc = crc32c(&DATA);
                data_blocks += 1;
            }
            record.encode(&mut bytes);
        }
        self.append_bytes(bytes, data_blocks)
    }

    /// Appends a batch whose records are `bytes` behind the room for the header.
    pub fn append_bytes(&mut self, mut bytes: Vec<u8>, data_blocks: u32) -> bool {
        let mut header = BatchHeader {
            pool: self.pool,
            seq: self.seq,
            records_len: (bytes.len() - BATCH_RECORDS) as u32,
            data_blocks,
            durable: self.seq - 1,
            block: 0,
        };
        let skipped = if self.pos + header.blocks() > self.blocks {
            self.blocks - self.pos
        } else {
            0
        };
        if self.used + skipped + header.blocks() >= self.blocks {
            return false;
        }
        if skipped > 0 {
            self.pos = 0;
        }
        header.block = self.pos;
        bytes.resize((header.head_blocks() * B) as usize, 0);
        header.encode(&mut bytes, &self.key);
        for _ in 0..data_blocks {
            bytes.extend_from_slice(&DATA);
        }
        put(self.device, self.start + self.pos, &bytes);
        self.used += skipped + header.blocks();
        self.pos = (self.pos + header.blocks()) % self.blocks;
        self.seq += 1;
        true
    }
}

/// Chooses records whose fields are mostly about what exists.
pub struct Maker<'a, C: Choose> {
    /// Where the choices come from.
    pub choose: &'a mut C,
    /// The next inode number of the pool.
    pub next_ino: u64,
    /// Blocks of the pool.
    pub blocks: u64,
}

impl<C: Choose> Maker<'_, C> {
    fn ino(&mut self) -> Ino {
        Ino(match self.choose.below(256) {
            250 => 0,
            251 => u64::MAX / 512, // about the largest that a record may name
            252 => self.choose.any() & ((1 << 55) - 1),
            253 => self.next_ino + 1,
            254 => self.next_ino + 2,
            255 => 1,
            other => other % (self.next_ino + 2),
        })
    }

    fn block(&mut self) -> u64 {
        match self.choose.below(256) {
            255 => (1 << 43) - self.choose.below(4),
            254 => 1 << self.choose.below(43),
            other => other,
        }
    }

    fn size(&mut self) -> u64 {
        let block = self.block();
        (block * B + self.choose.below(4) * 1365).min(1 << 55)
    }

    fn name(&mut self) -> Vec<u8> {
        match self.choose.below(32) {
            31 => vec![b'n'; self.choose.below(256) as usize + 1],
            other => NAMES[other as usize % NAMES.len()].to_vec(),
        }
    }

    fn now(&mut self) -> Time {
        match self.choose.below(8) {
            7 => Time {
                secs: i64::MIN,
                nanos: u32::MAX,
            },
            6 => Time {
                secs: i64::MAX,
                nanos: 999_999_999,
            },
            secs => Time {
                secs: secs as i64,
                nanos: 0,
            },
        }
    }

    fn map(&mut self) -> Record {
        let len = match self.choose.below(16) {
            15 => 300,
            other => other as u32 + 1,
        };
        let block = match self.choose.below(4) {
            0 => self.choose.below(self.blocks + 20),
            1 => self.choose.below(300),
            2 => self.blocks - self.choose.below(20).min(self.blocks),
            // Where a young pool has its free space.
            _ => self.blocks / 2 + self.choose.below(256),
        };
        Record::Map {
            ino: self.ino(),
            block: self.block(),
            extent: Extent { block, len },
            sums: vec![7; len as usize],
        }
    }

    fn create(&mut self) -> Record {
        Record::Create {
            dir: self.ino(),
            name: self.name(),
            ino: self.ino(),
            generation: self.choose.any(),
            kind: self.choose.below(9) as u8,
            mode: self.choose.below(1 << 16) as u16,
            uid: 1000,
            gid: 1000,
            rdev: 5,
            target: vec![b't'; [0, 1, 2000, 4095][self.choose.index(4)]],
            now: self.now(),
        }
    }

    /// The next record.
    pub fn record(&mut self) -> Record {
        match self.choose.below(18) {
            0 | 1 => Record::Block {
                ino: self.ino(),
                block: self.block(),
                crc: 0,
            },
            2 => Record::Zero {
                ino: self.ino(),
                block: self.block(),
            },
            3 => self.map(),
            4 => Record::Touch {
                ino: self.ino(),
                size: self.size(),
                mtime: self.now(),
                ctime: self.now(),
            },
            5 => Record::SetAttr {
                ino: self.ino(),
                mask: self.choose.below(256) as u8,
                mode: 0o7777,
                uid: 1,
                gid: 2,
                times: [self.now(), self.now(), self.now()],
            },
            6 => self.create(),
            7 => Record::Link {
                ino: self.ino(),
                dir: self.ino(),
                name: self.name(),
                now: self.now(),
            },
            8 => Record::Unlink {
                dir: self.ino(),
                name: self.name(),
                directory: self.choose.below(2) == 1,
                now: self.now(),
            },
            9 => Record::Rename {
                dir: self.ino(),
                name: self.name(),
                new_dir: self.ino(),
                new_name: self.name(),
                mode: self.choose.below(4) as u8,
                now: self.now(),
            },
            10 => Record::SetXattr {
                ino: self.ino(),
                name: self.name(),
                value: vec![9; [0, 5, 959, 5000][self.choose.index(4)]],
                now: self.now(),
            },
            11 => Record::RemoveXattr {
                ino: self.ino(),
                name: self.name(),
                now: self.now(),
            },
            12 => Record::Truncate {
                ino: self.ino(),
                size: self.size(),
                now: self.now(),
            },
            other => self.shared(other),
        }
    }

    fn shared(&mut self, which: u64) -> Record {
        match which {
            13 => Record::Punch {
                ino: self.ino(),
                block: self.block(),
                count: self.count(),
                now: self.now(),
            },
            14 => Record::Clone {
                src: self.ino(),
                dst: self.ino(),
                size: self.size(),
                pinned: self.choose.below(2) == 1,
                now: self.now(),
            },
            15 => Record::CloneRange {
                src: self.ino(),
                block: self.block(),
                dst: self.ino(),
                dst_block: self.block(),
                count: self.count().min(1 << 43),
            },
            16 => Record::Show {
                dst: self.ino(),
                size: self.size(),
                now: self.now(),
            },
            _ => Record::EndClone { dst: self.ino() },
        }
    }

    fn count(&mut self) -> u64 {
        match self.choose.below(64) {
            63 => u64::MAX,
            62 => 1 << 43,
            other => other + 1,
        }
    }
}
