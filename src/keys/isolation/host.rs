//! The child: `pintle plugin-host` gives up what it does not need, opens the module, and answers.

use std::io::BufReader;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyBackend};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use super::protocol::{Answer, Octets, Request, Response, read_frame, write_frame};

/// Serves the agent at the other end of standard input until it hangs up.
///
/// # Errors
/// In one line, what kept the child from serving.
pub(crate) fn serve() -> Result<(), String> {
    let stream = take_socket()?;
    give_up(&stream).map_err(|(what, error)| format!("cannot {what}: {error}"))?;
    let (mut reader, mut writer) = (BufReader::new(&stream), &stream);
    let mut backend: Option<Box<dyn KeyBackend>> = None;
    loop {
        // The agent has ended, or wants this child to end.
        let Some(request) = read_frame(&mut reader).map_err(|error| format!("the agent's request: {error}"))? else {
            return Ok(());
        };
        let response = answer(&mut backend, request);
        write_frame(&mut writer, &response).map_err(|error| format!("the answer: {error}"))?;
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
        Request::Sign { id, scheme, message } => Answer::Signature(Octets(backend.sign(&id, scheme, &message.0)?)),
        Request::Delete { id } => {
            backend.delete(&id)?;
            Answer::Done
        }
        Request::List => Answer::Keys(backend.list()?),
        Request::Reference { id } => Answer::Reference(backend.reference(&id)?),
        Request::Usage => Answer::Usage(backend.usage()?),
    })
}

/// The socket, which came as standard input, moved to where a module does not stumble over it.
fn take_socket() -> Result<UnixStream, String> {
    let input = std::io::stdin();
    if rustix::net::sockopt::socket_domain(&input) != Ok(rustix::net::AddressFamily::UNIX) {
        return Err("plugin-host is what pintle starts for itself; there is nothing to do with it by hand".to_owned());
    }
    let socket = input.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let null: OwnedFd = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| format!("/dev/null: {error}"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|error| error.to_string())?;
    Ok(UnixStream::from(socket))
}

/// Gives up whatever serving a module does not need. Nothing of the module is in this process yet.
fn give_up(socket: &UnixStream) -> Result<(), (&'static str, std::io::Error)> {
    let failed = |what| move |error: rustix::io::Errno| (what, std::io::Error::from(error));
    close_inherited(socket).map_err(|error| ("close the descriptors that were inherited", error))?;
    // The agent ends a child; a child whose agent was killed must not stay with the device.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("follow the agent"))?;
    thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    give_up_capabilities().map_err(failed("give up capabilities"))?;
    // PINs must reach neither a core dump nor another process of the same user.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(failed("forbid core dumps"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid core dumps"))?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    // What a terminal sends to the agent's process group is not for the module.
    rustix::process::setsid().map_err(failed("have its own session"))?;
    Ok(())
}

/// What root's child keeps of root's powers: to get to devices and tokens that belong to others (`/dev/tpmrm0` is
/// tss's), and to keep PINs and keys from being swapped out. A child that runs as another user has none to keep.
const KEPT: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::IPC_LOCK);

/// Gives up every other capability, in every set. A sandbox may forbid even to ask, so only what is there is given up.
fn give_up_capabilities() -> rustix::io::Result<()> {
    let held = thread::capabilities(None)?;
    // Who may not change the bounding set need not: without new privileges (execve(2)) nothing is gained from it.
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for capability in (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
            match thread::capability_is_in_bounding_set(capability) {
                Ok(true) if !KEPT.contains(capability) => thread::remove_capability_from_bounding_set(capability)?,
                Ok(_) => {}
                // The kernel knows no more.
                Err(_) => break,
            }
        }
    }
    let none = CapabilitySet::empty();
    let kept = CapabilitySets { effective: held.effective & KEPT, permitted: held.permitted & KEPT, inheritable: none };
    if kept == held {
        return Ok(());
    }
    // The ambient set is within the inheritable one (capabilities(7)), and goes with it.
    thread::set_capabilities(None, kept)
}

/// Closes every descriptor but the first three and the socket. This program opens its own with O_CLOEXEC; what is left
/// is a library's, or was left open by whoever started the agent.
fn close_inherited(socket: &UnixStream) -> std::io::Result<()> {
    let descriptors: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|descriptor| *descriptor > 2 && *descriptor != socket.as_raw_fd())
        .collect();
    for descriptor in descriptors {
        // The one of the directory itself is closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}
