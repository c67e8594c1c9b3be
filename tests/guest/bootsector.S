/*
 * A disk's first sector that a BIOS boots: it writes `count N` to the first serial port at each tick of the BIOS's clock.
 *
 * gcc -nostdlib -static -m32 -Wl,-Ttext=0x7c00,--oformat=binary,--build-id=none
 */
    .code16
    .globl _start
_start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
again:
    incw count
    movw $word, %si
    call say
    movw count, %ax
    call say_number
    movb $'\n', %al
    call put
    hlt
    jmp again

put:
    pushw %ax
    movw $0x3fd, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    popw %ax
    movw $0x3f8, %dx
    outb %al, %dx
    ret

say:
    lodsb
    testb %al, %al
    jz 1f
    call put
    jmp say
1:  ret

say_number:
    xorw %dx, %dx
    movw $10, %cx
    divw %cx
    pushw %dx
    testw %ax, %ax
    jz 1f
    call say_number
1:  popw %ax
    addb $'0', %al
    jmp put

word:
    .asciz "count "
count:
    .word 0
    .org 510
    .word 0xaa55
