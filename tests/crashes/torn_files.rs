//! Files that are torn, exchanged or gone.

use std::fs;
use std::path::Path;

use pintle_test_support::eventually;

use crate::embedded::{DEADLINE, Embedded};
use crate::{HOUR, enrolled, wait_until_holding};

/// Zeros of the same length, as some file systems leave them after a power cut.
fn tear(path: &Path) {
    let length = fs::metadata(path).expect("it exists").len();
    fs::write(path, vec![0; usize::try_from(length).expect("a small file")]).expect("writable");
}

#[test]
fn c02_torn_files_are_survived() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "torn");
    let first = node.current().expect("a pair");
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), first.serial);
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    agent.kill();
    let second = node.current().expect("a pair");
    let current = || fs::canonicalize(node.current_path()).expect("a link");

    // The newest pair: the journal has its certificate, and the backend its key.
    tear(&current());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), second.serial);
    assert_eq!(node.current(), Some(second.clone()));
    assert!(node.keys().len() <= 2);

    // The same under a running agent, and then the whole directory.
    tear(&current());
    eventually("it is written again", DEADLINE, || (node.current()? == second).then_some(()));
    fs::remove_dir_all(node.cert_dir()).expect("removed");
    eventually("it is written again", DEADLINE, || (node.current()? == second).then_some(()));

    // The journal alone.
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    let third = node.current().expect("a pair");
    agent.kill();
    tear(&node.journal());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), third.serial);
    // It is told before it is saved.
    let saved = || eventually("the journal is saved", DEADLINE, || node.journal().exists().then_some(()));
    saved();
    agent.kill();
    assert_eq!(control_plane.requests_of("torn").len(), 3, "nothing was requested for all that");

    // The newest pair and the journal: the previous pair is still good.
    tear(&node.journal());
    tear(&current());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), second.serial);
    assert_eq!(node.current(), Some(second));
    saved();
    agent.kill();
    assert_eq!(control_plane.requests_of("torn").len(), 3);

    // Everything: only the bootstrap credential is left. The keys of before may be anybody's, so they are left alone.
    let left = node.keys();
    tear(&node.journal());
    node.pairs().iter().for_each(|pair| tear(pair));
    let mut agent = node.agent().start();
    assert_eq!(Some(wait_until_holding(&mut agent)), node.current().map(|pair| pair.serial));
    assert_eq!(control_plane.requests_of("torn").len(), 4);
    assert!(left.iter().all(|key| node.keys().contains(key)), "{left:?} and now {:?}", node.keys());
}

/// Puts somebody else's private key into a pair.
fn exchange_key(path: &Path) {
    let pair = fs::read_to_string(path).expect("readable");
    let key = pair.find("-----BEGIN PRIVATE KEY").expect("a key");
    let other = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    fs::write(path, format!("{}{other}", &pair[..key])).expect("writable");
}

#[test]
fn c02_a_pair_with_somebody_elses_key_is_not_used() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "exchanged");
    let first = node.current().expect("a pair");
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), first.serial);
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    let (second, good) = (node.current().expect("a pair"), fs::read(node.current_path()).expect("readable"));
    let current = || fs::canonicalize(node.current_path()).expect("a link");

    // Under a running agent, and at a start: the key is still in the backend.
    exchange_key(&current());
    eventually("it is written again", DEADLINE, || (fs::read(node.current_path()).ok()? == good).then_some(()));
    agent.kill();
    exchange_key(&current());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), second.serial);
    assert_eq!(fs::read(node.current_path()).expect("readable"), good);
    agent.kill();

    // With nothing but the pairs, the previous one is still good, and then there is none.
    exchange_key(&current());
    fs::remove_dir_all(node.state_dir()).expect("removed");
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), first.serial);
    assert_eq!(control_plane.requests_of("exchanged").len(), 2);
    agent.kill();
    node.pairs().iter().for_each(|pair| exchange_key(pair));
    fs::remove_dir_all(node.state_dir()).expect("removed");
    node.agent().start().wait_for_log("a new certificate", DEADLINE, |line| {
        line["event"] == "holding" && line["serial"] != first.serial && line["serial"] != second.serial
    });
    assert_eq!(control_plane.requests_of("exchanged").len(), 3);
}

/// As a kubelet does that rotates beside us: another file, and the link flipped.
#[test]
fn c46_a_pair_that_something_else_writes_is_named_and_held() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "beside");
    let other = enrolled(&control_plane, "beside");
    let own_keys = node.keys();
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent);
    let theirs = other.current().expect("a pair");
    let (file, link) = (node.cert_dir().join("kubelet-client-by-kubelet.pem"), node.cert_dir().join("next"));
    fs::copy(other.current_path(), &file).expect("copied");
    std::os::unix::fs::symlink(&file, &link).expect("linked");
    fs::rename(&link, node.current_path()).expect("flipped");
    agent.wait_for_log("it is named", DEADLINE, |line| {
        line["event"] == "credential_adopted" && line["serial"] == *theirs.serial
    });
    agent.wait_for_log("it is proven", DEADLINE, |line| {
        line["event"] == "identity_proven" && line["serial"] == *theirs.serial
    });
    eventually("the key before is destroyed", DEADLINE, || {
        own_keys.iter().all(|key| !node.keys().contains(key)).then_some(())
    });
    assert_eq!(node.current().expect("a pair"), theirs);
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    agent.process().assert_running();
}

#[test]
fn c09_c10_a_plain_file_is_adopted_and_a_lost_directory_made_again() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "moved");
    let pair = node.current().expect("a pair");
    let content = fs::read(node.current_path()).expect("readable");

    node.pairs().iter().for_each(|pair| fs::remove_file(pair).expect("removed"));
    fs::remove_file(node.current_path()).expect("removed");
    fs::write(node.current_path(), &content).expect("written");
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    assert!(node.current_path().is_symlink());
    assert_eq!((node.current(), node.pairs().len()), (Some(pair.clone()), 1));

    fs::remove_dir_all(node.cert_dir()).expect("removed");
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    assert_eq!(node.current(), Some(pair.clone()));
    assert_eq!(control_plane.requests_of("moved").len(), 1);

    // Both directories on a tmpfs, and a reboot.
    fs::remove_dir_all(node.cert_dir()).expect("removed");
    fs::remove_dir_all(node.state_dir()).expect("removed");
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    assert_ne!(node.current().expect("a pair").public_key, pair.public_key);
    assert_eq!((control_plane.requests_of("moved").len(), node.keys().len()), (2, 1));
}
