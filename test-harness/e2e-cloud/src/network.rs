//! The control plane and the nodes as hosts of their own: network namespaces on a switch that loses,
//! resets or refuses what passes, or loses a port.
//!
//! Needs root, util-linux, iproute2 and nftables ([`is_possible`]). A namespace lives as long as its file is open or a process runs
//! in it, so that nothing is left behind.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

/// All hosts of a network.
const NETWORK: &str = "10.77.0.0/24";
/// Where the control plane's host is.
pub const CONTROL: &str = "10.77.0.1";
/// The chain through which everything between hosts goes.
const CUT: &str = "add table bridge cut; add chain bridge cut forward { type filter hook forward priority 0; policy drop; }";
/// On the control plane's host, both ways: a connection that is made is refused, one that stands is reset.
const REFUSE: &str = "add table inet refuse; \
    add chain inet refuse out { type filter hook output priority 0; }; \
    add chain inet refuse in { type filter hook input priority 0; }; \
    add rule inet refuse out oifname eth0 tcp flags & rst == 0 reject with tcp reset; \
    add rule inet refuse in iifname eth0 tcp flags & rst == 0 reject with tcp reset";

/// Whether this machine can have such networks. Where it cannot, that is said, and in CI it is a failure.
pub fn is_possible() -> bool {
    let is_there = |name: &&str| {
        let tried = Command::new(name).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    let mut lacks: Vec<&str> =
        ["ip", "ss", "nft", "nsenter"].into_iter().filter(|name| !is_there(name)).collect();
    if !std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
        lacks.push("root");
    }
    if lacks.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "CI must cut networks, and lacks {}", lacks.join(", "));
    crate::left_out(&format!("nothing is cut: this machine lacks {}", lacks.join(", ")));
    false
}

/// A host, by its network namespace.
#[derive(Debug)]
pub struct Host(File);

impl Host {
    /// One with nothing but its loopback.
    fn new() -> Self {
        // A thread of its own: whoever leaves a namespace does not come back by itself.
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map(|()| File::open("/proc/thread-self/ns/net"))
        });
        let file = made.join().expect("the thread does not panic");
        let file = file.expect("network namespaces need root: run the tests as CI does").expect("procfs");
        let host = Self(file);
        host.run("ip link set lo up");
        host
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// The program, to be started there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    fn run(&self, script: &str) {
        let output = self.command("sh").args(["-ec", script]).output().expect("nsenter (util-linux) runs");
        let reported = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{script}: {reported}(these journeys need root, iproute2 and nftables)"
        );
    }

    /// Runs it there: all its connections are made from there, and programs that it starts are there too.
    pub fn within<T: Send>(&self, run: impl AsyncFnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).expect("root may enter");
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.expect("a runtime").block_on(run())
            });
            there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// One direction, in which packets may be lost while the other goes on.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    FromNode(usize),
    ToNode(usize),
    FromControl,
    ToControl,
}

/// A control plane's host and nodes' hosts on one switch.
#[derive(Debug)]
pub struct Network {
    pub control: Host,
    pub nodes: Vec<Host>,
    switch: Host,
}

impl Network {
    /// Of so many nodes.
    pub fn new(nodes: usize) -> Self {
        let (control, switch) = (Host::new(), Host::new());
        let nodes: Vec<Host> = (0..nodes).map(|_| Host::new()).collect();
        switch.run("ip link add switch type bridge forward_delay 0 && ip link set switch up");
        let network = Self { control, nodes, switch };
        network.plug("control", &network.control, CONTROL);
        for (n, host) in network.nodes.iter().enumerate() {
            network.plug(&format!("node{n}"), host, &node_address(n));
        }
        network
    }

    fn plug(&self, port: &str, host: &Host, address: &str) {
        let there = host.path();
        self.switch.run(&format!(
            "ip link add {port} type veth peer name eth0 netns {} && ip link set {port} master switch up",
            there.display()
        ));
        host.run(&format!("ip address add {address}/24 dev eth0 && ip link set eth0 up"));
    }

    /// Nothing passes the switch any more, and nobody is told.
    pub fn cut(&self) {
        self.switch.run(&format!("nft '{CUT}'"));
    }

    /// Everything passes again.
    pub fn mend(&self) {
        self.switch.run("nft delete table bridge cut");
    }

    /// From now on all packets that go this way are lost, and nobody is told; those of the other way pass.
    pub fn cut_way(&self, way: Way) {
        let (end, address) = match way {
            Way::FromNode(n) => ("saddr", node_address(n)),
            Way::ToNode(n) => ("daddr", node_address(n)),
            Way::FromControl => ("saddr", CONTROL.to_owned()),
            Way::ToControl => ("daddr", CONTROL.to_owned()),
        };
        self.switch.run(&format!(
            "nft 'add table bridge way; \
             add chain bridge way forward {{ type filter hook forward priority 0; }}; \
             add rule bridge way forward ip {end} {address} drop'"
        ));
    }

    pub fn mend_way(&self) {
        self.switch.run("nft delete table bridge way");
    }

    /// From now on one packet of so many is lost, at random, between any two hosts.
    pub fn lose_one_in(&self, packets: u32) {
        self.switch.run(&format!(
            "nft 'add table bridge loss; \
             add chain bridge loss forward {{ type filter hook forward priority 0; }}; \
             add rule bridge loss forward numgen random mod {packets} == 0 drop'"
        ));
    }

    /// Resets the connections between hosts that stand; new ones pass.
    pub fn reset(&self) {
        self.control.run(&format!("ss --kill --numeric --tcp state established dst {NETWORK}"));
    }

    /// From now on all connections between hosts are reset and refused.
    pub fn refuse(&self) {
        self.control.run(&format!("nft '{REFUSE}'"));
        self.reset();
    }

    pub fn refuse_no_more(&self) {
        self.control.run("nft delete table inet refuse");
    }

    /// Takes the control plane's host off the switch: its own end sees that, no node does.
    pub fn unplug_control(&self) {
        self.switch.run("ip link set control down");
    }

    pub fn plug_control(&self) {
        self.switch.run("ip link set control up");
    }

    /// The cable of node `n`.
    pub fn unplug_node(&self, n: usize) {
        self.switch.run(&format!("ip link set node{n} down"));
    }

    /// A firewall on the host of node `n`: no connection from elsewhere begins, those that stand go on.
    pub fn close_node(&self, n: usize) {
        self.nodes[n].run(
            "nft 'add table inet firewall; \
             add chain inet firewall input { type filter hook input priority 0; }; \
             add rule inet firewall input iifname != lo tcp flags & (syn | ack) == syn drop'",
        );
    }

    pub fn open_node(&self, n: usize) {
        self.nodes[n].run("nft delete table inet firewall");
    }

    pub fn plug_node(&self, n: usize) {
        self.switch.run(&format!("ip link set node{n} up"));
    }
}

/// Where the host of node `n` is.
pub fn node_address(n: usize) -> String {
    format!("10.77.0.{}", n + 10)
}
