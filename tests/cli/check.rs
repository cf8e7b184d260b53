//! `nodupe check` and `check --repair` as a user meets them: exit codes, JSON, refusals.

use super::*;

/// Ruins block `block` of a pool.
fn ruin(pool: &Path, block: usize) {
    let mut bytes = fs::read(pool).unwrap();
    bytes[block * 4096..][..4096].fill(0xa5);
    fs::write(pool, bytes).unwrap();
}

/// The last block before the superblock copies that holds something.
fn last_block(pool: &Path) -> usize {
    let bytes = fs::read(pool).unwrap();
    let end = bytes.len() - 2 * 4096;
    let last = bytes[..end].iter().rposition(|&byte| byte != 0).unwrap();
    last / 4096
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[test]
fn exit_codes_tell_how_it_ended() {
    let sandbox = Sandbox::new();
    let pool = sandbox.pool();
    let pool = text(&pool);
    let repair = ["check", "--repair", "--yes", pool];
    succeeds(&run(&["check", pool]));
    let before = std::fs::read(pool).unwrap();
    let clean = run(&repair);
    succeeds(&clean);
    assert!(stdout(&clean).contains("nothing was changed"));
    assert!(std::fs::read(pool).unwrap() == before);

    ruin(Path::new(pool), last_block(Path::new(pool)));
    let before = state(Path::new(pool));
    let found = run(&["check", pool]);
    assert_eq!(code(&found), Some(1), "{}", stderr(&found));
    assert!(stdout(&found).starts_with("E00"), "{}", stdout(&found));
    assert!(stderr(&found).contains("--repair"), "{}", stderr(&found));
    // Nobody can be asked here.
    fails(&run(&["check", "--repair", pool]), 2, &["--yes"]);
    fails(&run(&["check", "--yes", pool]), 2, &["--repair"]);
    fails(&run(&["check", "--memory", "much", pool]), 2, &["much"]);
    let nowhere = sandbox.path("nowhere");
    fails(&run(&["check", text(&nowhere)]), 3, &["there is no pool"]);
    assert_eq!(state(Path::new(pool)), before);

    let repaired = run(&repair);
    assert_eq!(code(&repaired), Some(4), "{}", stderr(&repaired));
    assert!(stdout(&repaired).contains("R0002"), "{}", stdout(&repaired));
    assert!(
        stderr(&repaired).contains("is repaired"),
        "{}",
        stderr(&repaired)
    );
    succeeds(&run(&["check", pool]));
    succeeds(&run(&repair));
}

#[test]
fn json_tells_findings_and_actions() {
    let sandbox = Sandbox::new();
    let pool = sandbox.pool();
    for slot in 0..2 {
        ruin(&pool, slot);
    }
    let parse = |output: &Output| -> Value { serde_json::from_str(&stdout(output)).unwrap() };
    let found = run(&["check", "--json", "--memory", "1M", text(&pool)]);
    assert_eq!(code(&found), Some(1), "{}", stderr(&found));
    let found = parse(&found);
    assert_eq!(
        (&found["schema"], &found["clean"]),
        (&1.into(), &false.into())
    );
    let codes: Vec<_> = found["findings"].as_array().unwrap().iter().collect();
    assert_eq!(codes.len(), 2);
    assert!(codes.iter().all(|finding| finding["code"] == 25));
    assert_eq!(found["counts"]["inodes"], 1);
    let done = run(&["check", "--repair", "--yes", "--json", text(&pool)]);
    assert_eq!(code(&done), Some(4), "{}", stderr(&done));
    let done = parse(&done);
    assert_eq!(
        (&done["clean"], &done["declined"]),
        (&true.into(), &false.into())
    );
    assert_eq!(done["before"]["findings"], found["findings"]);
    assert_eq!(done["actions"][0]["code"], 1);
    json(
        &run(&["check", "--json", text(&pool)]),
        &["counts", "seconds"],
    );
}

#[test]
fn what_is_no_pool_any_more_could_not_be_checked() {
    let sandbox = Sandbox::new();
    let pool = sandbox.pool();
    let blocks = fs::metadata(&pool).unwrap().len() as usize / 4096;
    for place in [0, 1, blocks - 2, blocks - 1] {
        ruin(&pool, place);
    }
    let before = state(&pool);
    for args in [
        vec!["check", text(&pool)],
        vec!["check", "--repair", "--yes", text(&pool)],
    ] {
        fails(&run(&args), 3, &["not a nodupe pool"]);
    }
    assert_eq!(state(&pool), before);
}
