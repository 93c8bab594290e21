//! The child process: `pintle plugin-host` drops its privileges, opens the module, and serves calls.

use std::io::BufReader;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyBackend};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use super::protocol::{Answer, Bytes, Request, Response, read_frame, write_frame};

/// Serves the agent on standard input until it closes the connection.
///
/// # Errors
/// A one-line message that says why the child cannot serve.
pub(crate) fn serve() -> Result<(), String> {
    let stream = take_socket()?;
    drop_privileges(&stream).map_err(|(what, error)| format!("cannot {what}: {error}"))?;
    let (mut reader, mut writer) = (BufReader::new(&stream), &stream);
    let mut backend: Option<Box<dyn KeyBackend>> = None;
    loop {
        // The agent has exited, or wants this child to exit.
        let request = read_frame(&mut reader).map_err(|error| format!("cannot read the agent's request: {error}"))?;
        let Some(request) = request else { return Ok(()) };
        let response = answer(&mut backend, request);
        write_frame(&mut writer, &response).map_err(|error| format!("cannot send the response: {error}"))?;
    }
}

fn answer(backend: &mut Option<Box<dyn KeyBackend>>, request: Request) -> Response {
    if let Request::Open(module) = request {
        *backend = Some(module.open()?);
        return Ok(Answer::Done);
    }
    let Some(backend) = backend else {
        return Err(BackendError::new(BackendErrorKind::Unavailable, "not opened yet"));
    };
    Ok(match request {
        Request::Open(_) => Answer::Done,
        Request::Generate { id, algorithm } => Answer::PublicKey(backend.generate(&id, algorithm)?),
        Request::PublicKey { id } => Answer::PublicKey(backend.public_key(&id)?),
        Request::Sign { id, scheme, message } => Answer::Signature(Bytes(backend.sign(&id, scheme, &message.0)?)),
        Request::Delete { id } => {
            backend.delete(&id)?;
            Answer::Done
        }
        Request::List => Answer::Keys(backend.list()?),
        Request::Reference { id } => Answer::Reference(backend.reference(&id)?),
        Request::Usage => Answer::Usage(backend.usage()?),
    })
}

/// Takes the socket from standard input and moves it to a descriptor that modules do not use.
fn take_socket() -> Result<UnixStream, String> {
    let input = std::io::stdin();
    if rustix::net::sockopt::socket_domain(&input) != Ok(rustix::net::AddressFamily::UNIX) {
        return Err("plugin-host is started by pintle itself and is not meant to be run by hand".to_owned());
    }
    let socket = input.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let null: OwnedFd = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| format!("/dev/null: {error}"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|error| error.to_string())?;
    Ok(UnixStream::from(socket))
}

/// Drops everything that serving a module does not need. Must run before the module is loaded.
fn drop_privileges(socket: &UnixStream) -> Result<(), (&'static str, std::io::Error)> {
    let failed = |what| move |error: rustix::io::Errno| (what, std::io::Error::from(error));
    close_inherited(socket).map_err(|error| ("close inherited descriptors", error))?;
    // The agent stops its children. If the agent is killed, the child must not keep using the device.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("set the parent death signal"))?;
    thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    drop_capabilities().map_err(failed("drop capabilities"))?;
    // PINs must not be readable from a core dump, or by another process of the same user.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(failed("disable core dumps"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("disable core dumps"))?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    // The module must not receive signals that a terminal sends to the agent's process group.
    rustix::process::setsid().map_err(failed("start a session"))?;
    Ok(())
}

/// The capabilities that a root child keeps: DAC_OVERRIDE, for devices and tokens owned by other users (`/dev/tpmrm0`
/// belongs to tss), and IPC_LOCK, to keep PINs and keys out of swap. A child that runs as another user has none to
/// keep.
const KEPT: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::IPC_LOCK);

/// Drops every other capability from every set. A sandbox may deny the calls, so only capabilities that are held are
/// dropped.
fn drop_capabilities() -> rustix::io::Result<()> {
    let held = thread::capabilities(None)?;
    // Without SETPCAP the bounding set cannot be changed, and need not be: with no_new_privs, execve(2) gains nothing
    // from it.
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for capability in (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
            match thread::capability_is_in_bounding_set(capability) {
                Ok(true) if !KEPT.contains(capability) => thread::remove_capability_from_bounding_set(capability)?,
                Ok(_) => {}
                // The kernel has no further capabilities.
                Err(_) => break,
            }
        }
    }
    let none = CapabilitySet::empty();
    let kept = CapabilitySets { effective: held.effective & KEPT, permitted: held.permitted & KEPT, inheritable: none };
    if kept == held {
        return Ok(());
    }
    // The ambient set is a subset of the inheritable one (capabilities(7)), and shrinks with it.
    thread::set_capabilities(None, kept)
}

/// Closes every descriptor except the first three and the socket. pintle opens its own with O_CLOEXEC; the others
/// belong to libraries, or were left open by the agent's parent.
fn close_inherited(socket: &UnixStream) -> std::io::Result<()> {
    let descriptors: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|descriptor| *descriptor > 2 && *descriptor != socket.as_raw_fd())
        .collect();
    for descriptor in descriptors {
        // Fails for the directory's own descriptor, which is already closed.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}
