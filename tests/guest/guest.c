/*
 * The tests' guest: a whole operating system of one kilobyte, so small that it runs where a real kernel cannot.
 *
 * Entered through its PVH note in 32-bit flat mode, paging off. Twenty-five times a second it writes `count N` to the first
 * serial port; N lives in memory, so a restored snapshot goes on from where it was taken. A line read from the port is a
 * command:
 *
 *   q           reset through the keyboard controller (what a guest's `reboot` or `poweroff` does to Firecracker)
 *   p           triple fault (what a panic without a handler looks like to the VMM)
 *   m           write to every page of the 16 MiB from 16 MiB on, then say `dirtied N KiB` (what exists of it)
 *   d           make the queues of its virtio disks ready, say `N queues` and leave them empty: the VMM serves them from then on
 *               (but those of disks that were plugged in: they are beyond 4 GiB)
 *   else        say `echo ` and the line
 *
 * A byte in the keyboard controller is Ctrl-Alt-Del: the guest resets.
 *
 * Between ticks it halts until the local APIC's timer fires, so a counting guest costs next to no CPU. Built with -DHALT it
 * says `idle` and halts for ever with interrupts off: no timer, no CPU at all, and deaf to Ctrl-Alt-Del.
 */

asm(".code32");

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum {
    COM1 = 0x3f8,
    COM1_STATUS = 0x3fd, /* bit 0: a byte to read, bit 5: room to write */
    KEYBOARD = 0x64,     /* read: bit 0, a byte waits; write 0xfe: reset */
    TICKS_PER_SECOND = 25,
};

/* https://xenbits.xen.org/docs/unstable/misc/pvh.html: the 32-bit entry point, as a note that the VMM looks for */
asm(".pushsection .note.pvh, \"a\", @note\n"
    ".align 4\n"
    ".long 4, 4, 18\n"
    ".asciz \"Xen\"\n"
    ".long _start\n"
    ".popsection\n");

asm(".pushsection .text.start, \"ax\"\n"
    ".globl _start\n"
    "_start:\n"
    "    cli\n"
    "    movl $stack_top, %esp\n"
    "    call run\n"
    ".popsection\n");

static inline u8 in(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void out(u16 port, u8 value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void put(char c)
{
    while (!(in(COM1_STATUS) & 0x20))
        ;
    out(COM1, (u8)c);
}

static void say(const char *text)
{
    while (*text)
        put(*text++);
}

#ifdef HALT

void run(void)
{
    say("idle\n");
    for (;;)
        asm volatile("cli; hlt");
}

#else

static void say_number(u32 number)
{
    char digits[10];
    int n = 0;
    do {
        digits[n++] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    while (n)
        put(digits[--n]);
}

struct __attribute__((packed)) table {
    u16 limit;
    u32 base;
};

static void reset(void)
{
    out(KEYBOARD, 0xfe);
    for (;;)
        asm volatile("cli; hlt");
}

static void triple_fault(void)
{
    struct table none = {0, 0};
    asm volatile("lidt %0; int3" : : "m"(none));
}

static void dirty_memory(void)
{
    static u32 round;
    u32 pages = 0;
    round++;
    for (u32 page = 16 << 20; page < 32 << 20; page += 4096) {
        volatile u32 *word = (volatile u32 *)page;
        *word = round + page;
        if (*word != round + page)
            break;
        pages++;
    }
    say("dirtied ");
    say_number(pages * 4);
    say(" KiB\n");
}

static u32 pci(u32 slot, u32 at)
{
    u32 value;
    asm volatile("outl %0, %w1" : : "a"(1u << 31 | slot << 11 | at), "Nd"(0xcf8));
    asm volatile("inl %w1, %0" : "=a"(value) : "Nd"(0xcfc));
    return value;
}

/* Where the device's common configuration is (VIRTIO 1.2, 4.1.4), 0 when that is beyond 4 GiB. */
static u32 common_configuration(u32 slot)
{
    for (u32 at = pci(slot, 0x34) & 0xfc; at; at = pci(slot, at) >> 8 & 0xfc) {
        if ((pci(slot, at) & 0xff0000ff) != 0x01000009)
            continue;
        u32 bar = 0x10 + 4 * (pci(slot, at + 4) & 7);
        if ((pci(slot, bar) & 6) == 4 && pci(slot, bar + 4))
            return 0;
        return (pci(slot, bar) & ~15u) + pci(slot, at + 8);
    }
    return 0;
}

/* The driver's part of VIRTIO 1.2, 3.1.1, with one ring for all: nothing will be in it. */
static u32 serve(volatile u8 *device)
{
    static u8 ring[6 * 4096] __attribute__((aligned(4096)));
    volatile u8 *status = device + 20;
    if (*status & 4)
        return 0;
    *status = 1 | 2;
    *(volatile u32 *)(device + 8) = 1; /* the upper half of the features: VIRTIO_F_VERSION_1 alone */
    *(volatile u32 *)(device + 12) = 1;
    *status = 1 | 2 | 8;
    u32 queues = *(volatile u16 *)(device + 18);
    for (u32 queue = 0; queue < queues; queue++) {
        *(volatile u16 *)(device + 22) = (u16)queue;
        for (u32 part = 0; part < 3; part++) {
            *(volatile u32 *)(device + 32 + 8 * part) = (u32)ring + 8192 * part;
            *(volatile u32 *)(device + 36 + 8 * part) = 0;
        }
        *(volatile u16 *)(device + 28) = 1;
    }
    *status = 1 | 2 | 8 | 4;
    return queues;
}

static void serve_disks(void)
{
    u32 queues = 0;
    for (u32 slot = 0; slot < 32; slot++) {
        u32 device = pci(slot, 0) == 0x10421af4 ? common_configuration(slot) : 0;
        if (device)
            queues += serve((volatile u8 *)device);
    }
    say_number(queues);
    say(" queues\n");
}

static void obey(const char *line, u32 length)
{
    if (length == 1 && *line == 'q')
        reset();
    if (length == 1 && *line == 'p')
        triple_fault();
    if (length == 1 && *line == 'm') {
        dirty_memory();
        return;
    }
    if (length == 1 && *line == 'd') {
        serve_disks();
        return;
    }
    say("echo ");
    while (length--)
        put(*line++);
    put('\n');
}

static void read_commands(void)
{
    static char line[256];
    static u32 length;
    while (in(COM1_STATUS) & 1) {
        char c = (char)in(COM1);
        if (c == '\n' || c == '\r') {
            if (length)
                obey(line, length);
            length = 0;
        } else {
            line[length++] = c;
            if (length == sizeof line) {
                obey(line, length);
                length = 0;
            }
        }
    }
}

/* The local APIC (Intel SDM volume 3, chapter 11). Hypervisors run its timer at 1 GHz. */
static volatile u32 *const apic = (volatile u32 *)0xfee00000;
enum { SPURIOUS = 0xf0, TIMER = 0x320, TIMER_COUNT = 0x380, TIMER_DIVIDE = 0x3e0 };
enum { VECTOR = 32, CODE = 8, DATA = 16 };

/* Back to after the hlt with interrupts still off. Not by iret: KVM's instruction emulator has none for protected mode. */
asm(".pushsection .text\n"
    "interrupt:\n"
    "    movl $0, 0xfee000b0\n"
    "    ret $8\n"
    ".popsection\n");
extern u8 interrupt[];

static void start_timer(void)
{
    static const u32 segments[][2] = {{0, 0}, {0x0000ffff, 0x00cf9b00}, {0x0000ffff, 0x00cf9300}};
    static u32 gates[VECTOR + 1][2];
    struct table gdt = {sizeof segments - 1, (u32)segments};
    struct table idt = {sizeof gates - 1, (u32)gates};

    gates[VECTOR][0] = CODE << 16 | ((u32)interrupt & 0xffff);
    gates[VECTOR][1] = ((u32)interrupt & 0xffff0000) | 0x8e00;
    asm volatile("lgdt %0\n"
                 "ljmp %2, $1f\n"
                 "1: movl %3, %%eax\n"
                 "movl %%eax, %%ds\n"
                 "movl %%eax, %%es\n"
                 "movl %%eax, %%ss\n"
                 "lidt %1\n"
                 : : "m"(gdt), "m"(idt), "i"(CODE), "i"(DATA) : "eax", "memory");
    /* The legacy controller's pins stay masked: only the timer may interrupt. */
    out(0x21, 0xff);
    out(0xa1, 0xff);
    apic[SPURIOUS / 4] = 0x1ff;
    apic[TIMER_DIVIDE / 4] = 0xb;
    apic[TIMER / 4] = 1 << 17 | VECTOR;
    apic[TIMER_COUNT / 4] = 1000000000 / TICKS_PER_SECOND;
}

void run(void)
{
    static u32 count;
    start_timer();
    for (;;) {
        say("count ");
        say_number(++count);
        put('\n');
        asm volatile("sti; hlt" : : : "memory");
        read_commands();
        if (in(KEYBOARD) & 1)
            reset();
    }
}

#endif
